"""What Make asks `visexpert compare` for when the runs of a method are through."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("with_base", [True, False])
def test_the_base_is_the_baseline_where_it_was_run(tmp_path: Path, with_base: bool) -> None:
    runs = tmp_path / "runs" / "smoke" / "movekd"
    for name in ("text-only", *(["base"] if with_base else [])):
        (runs / name / "seed0").mkdir(parents=True)
    command = tmp_path / "bin" / "visexpert"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "asked: $@"\n')
    command.chmod(0o755)
    settings = [f"BIN={command.parent}", f"ABLATION_ROOT={tmp_path / 'runs'}", "SCALE=smoke"]
    asked = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "ablation-report-movekd", *settings],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("--baseline base" in asked) == with_base
    assert asked.count("/seed0") == 1 + with_base
