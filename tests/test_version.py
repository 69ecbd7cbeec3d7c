"""The version: said once, and told by the package, the command line and every run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import visexpert
from visexpert.cli import main
from visexpert.report.machine import package_versions


def test_the_command_line_and_a_runs_versions_name_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", visexpert.__version__)
    main(["--version"])
    assert capsys.readouterr().out == f"visexpert {visexpert.__version__}\n"
    assert package_versions()["visexpert"] == visexpert.__version__


def test_the_version_is_written_down_once() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and not re.search(r"^version = \"", project, flags=re.MULTILINE)
    assert '[tool.hatch.version]\npath = "src/visexpert/version.py"' in project
