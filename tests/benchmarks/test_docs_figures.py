"""Figures of a run in the sizes of the README."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from benchmarks.docs_figures import copy


def test_photographs_become_jpeg_of_one_width_and_plots_stay(tmp_path: Path) -> None:
    (tmp_path / "run" / "figures").mkdir(parents=True)
    for name in ("gate_maps", "captions", "gate_by_region"):
        Image.new("RGB", (300, 100)).save(tmp_path / "run" / "figures" / f"{name}.png")
    made = {path.name: Image.open(path).size for path in copy(tmp_path / "run", tmp_path)}
    assert made == {"gate_maps.jpg": (1200, 400), "captions.jpg": (1200, 400), "gate_by_region.png": (300, 100)}
