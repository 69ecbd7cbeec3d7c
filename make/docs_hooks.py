"""Pages of the site that lie outside docs/: CONTRIBUTING.md and CHANGELOG.md, with links that lead from there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

log = get_plugin_logger("visexpert")

ROOT = Path(__file__).parents[1]
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


def from_docs(text: str) -> str:
    """Return a text whose links lead from docs/ instead of from the top; links to other files become plain text."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\(README\.md\)", "](index.md)", text)
    text = re.sub(r"\]\(CONTRIBUTING\.md(#[\w-]+)?\)", r"](contributing.md\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?:src|tests|configs|benchmarks)/[^)]*\)", r"\1", text)
