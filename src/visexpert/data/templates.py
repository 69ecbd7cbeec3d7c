"""Prompts with a placeholder for the question."""

from __future__ import annotations

from string import Formatter

from visexpert.errors import ConfigError


def check_template(template: str, field: str) -> str:
    """Check that a prompt has exactly its one placeholder, and return it.

    Raises:
        ConfigError: The placeholder is missing, repeated, or not the only one.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        fields = []
    if fields != [field]:
        raise ConfigError(f"prompt is {template!r}, but must have {{{field}}} in it once and no other braces.")
    return template
