"""Copy a run's figures to docs/figures, small enough for the README: ``python -m benchmarks.docs_figures RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

FOLDER = Path("docs/figures")
PHOTOGRAPHS = ("gate_maps", "captions")
PLOTS = ("gate_by_region",)
WIDTH = 1200
"""Width of photographs in pixels."""


def copy(run: Path, folder: Path = FOLDER) -> list[Path]:
    """Write photographs as JPEG and plots as PNG; return the written files."""
    made = []
    for name in (*PHOTOGRAPHS, *PLOTS):
        with Image.open(run / "figures" / f"{name}.png") as image:
            picture = image.convert("RGB")
        if name in PHOTOGRAPHS:
            picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
            made.append(folder / f"{name}.jpg")
            picture.save(made[-1], quality=85, optimize=True)
        else:
            made.append(folder / f"{name}.png")
            picture.save(made[-1], optimize=True)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of the demo's ToVE")
    for path in copy(parser.parse_args().run):
        print(path)
