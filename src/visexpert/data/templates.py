"""Prompts with a place for the question."""

from __future__ import annotations

from string import Formatter

from visexpert.errors import ConfigError


def check_template(template: str, field: str) -> str:
    """Return a prompt's template if it has the one place that it must have.

    Raises:
        ConfigError: It has none, or others.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        fields = []
    if fields != [field]:
        raise ConfigError(f"prompt is {template!r}, but must have {{{field}}} in it once and no other braces.")
    return template
