"""Pages of the site that lie outside docs/ (CONTRIBUTING.md and CHANGELOG.md), and equations as MathML."""

from __future__ import annotations

import html
import inspect
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

log = get_plugin_logger("visexpert")

ROOT = Path(__file__).parents[1]
EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])</(?P=tag)>', re.S
)
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=from_docs((ROOT / name).read_text(encoding="utf-8"))))
    return files


def on_pre_build(*, config: Any) -> None:
    """Warn, which fails the build, of public names that the API reference lacks, or that have no docstring."""
    import visexpert

    listed = set(re.findall(r"^::: visexpert\.\w+\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M))
    for name in sorted(set(visexpert.__all__) - {"__version__"}):
        if name not in listed:
            log.warning("docs/api.md has no entry for visexpert.%s", name)
        if not inspect.getdoc(getattr(visexpert, name)):
            log.warning("visexpert.%s has no docstring", name)


def on_page_content(text: str, *, page: Any, **_: Any) -> str:
    """Return the page with its equations as MathML, which browsers draw without a script."""

    def draw(found: re.Match[str]) -> str:
        block = found["block"] is not None
        latex = html.unescape(found["block"] if block else found["inline"]).strip()
        try:
            drawn = convert(latex, display="block" if block else "inline")
        except Exception as error:  # its exceptions have no common class
            log.warning("%s: cannot draw %r: %r", page.file.src_uri, latex, error)  # a warning fails the build
            return found[0]
        if unknown := re.findall(r"\\\w+", drawn):
            log.warning("%s: cannot draw %s in %r", page.file.src_uri, unknown, latex)
        return drawn

    return EQUATION.sub(draw, text)


def from_docs(text: str) -> str:
    """Return a text whose links lead from docs/ instead of from the top; links to other files become plain text."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\(README\.md\)", "](index.md)", text)
    text = re.sub(r"\]\(CONTRIBUTING\.md(#[\w-]+)?\)", r"](contributing.md\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?:src|tests|configs|benchmarks)/[^)]*\)", r"\1", text)
