"""The line that says what a figure was measured on."""

from __future__ import annotations

import pytest
import torch

from visexpert.report import describe_machine
from visexpert.report.machine import machine_facts, package_versions


def test_the_line_names_torch_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    line = describe_machine()
    assert "\n" not in line
    assert line.endswith(f"torch {torch.__version__}, 7 threads")
    assert f"{machine_facts()['cores']} cores" in line


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.report.machine.PACKAGES", ("torch", "no-such-package-of-ours"))
    assert set(package_versions()) == {"torch"}
