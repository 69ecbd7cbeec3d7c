"""Colors and look of the figures: one palette that color-blind readers can tell apart, and colors laid over images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from numpy.typing import NDArray

from visexpert.errors import DataError, first_line, told_by_machine
from visexpert.io.run_files import write_bytes

log = logging.getLogger(__name__)

Floats = NDArray[np.floating[Any]]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#7F7F7F")
"""Okabe and Ito's colors (https://jfly.uni-koeln.de/color/), black replaced by gray."""

DPI = 150

INK = "#222222"
GRAY = "#666666"
RIGHT = "#00794F"
WRONG = "#C63A00"


class NothingToDrawError(DataError):
    """Raised where a run has logged nothing that a figure shows."""


def colors(count: int) -> list[str]:
    """One hex color for each of ``count`` things; beyond eight they come from an even, less distinct scale."""
    if count <= len(OKABE_ITO):
        return list(OKABE_ITO[:count])
    return [to_hex(colormaps["turbo"](i / (count - 1))) for i in range(count)]


def rgb(names: list[str]) -> Floats:
    """Colors as rows of RGB in [0, 1]."""
    return np.array([to_rgb(name) for name in names])


def blend(below_HW3: Floats, above_HW3: Floats, share: float | Floats) -> Floats:
    """Lay ``above`` over ``below``; ``share`` (0 to 1, scalar or (H, W, 1)) is how opaque it is."""
    return below_HW3 * (1 - share) + above_HW3 * share


def styled(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
    """Give axes the common look: light horizontal grid, no box, quiet text."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=GRAY)
    axes.set_ylabel(ylabel, fontsize=9, color=GRAY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=8, colors=GRAY, length=3)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def canvas(width: float, height: float, *, pad: float = 0.04) -> Figure:
    """Return a white figure, sizes in inches, that draws without a screen whatever backend the process uses."""
    layout = ConstrainedLayoutEngine(h_pad=pad, w_pad=pad)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def as_written(figure: Figure) -> None:
    """Show the texts of a figure as they are: in names and captions a dollar sign begins no formula.

    What is no Unicode, such as half a surrogate pair, is shown as a question mark. Labels of ticks stay: those of a
    logarithmic axis are formulas.
    """
    axes = [axis for part in figure.axes for axis in (part.xaxis, part.yaxis)]
    ticks = [tick for axis in axes for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    kept = {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if id(text) not in kept:
            text.set_parse_math(False)
            text.set_text(_unicode(text.get_text()))


def tick_label(name: str) -> str:
    """Return a name as the label of a tick, which is shown as it is."""
    return _unicode(name).replace("$", r"\$")


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def save(figure: Figure, out: Path) -> Path:
    """Write the figure as PNG and return its path; the folder is made where it is missing.

    Raises:
        DataError: It cannot be written; an earlier figure stays as it was.
    """
    picture = BytesIO()
    as_written(figure)
    figure.savefig(picture, format="png")
    write_bytes(out, picture.getvalue())
    return out


@contextmanager
def spared(name: str) -> Iterator[None]:
    """Draw or write a figure; turn an error into a warning of one sentence, so that the run goes on."""
    try:
        yield
    except NothingToDrawError as error:  # a short run has logged no step, other methods no distillation
        log.debug("No %s: %s", name, error)
    except Exception as error:
        told = str(told_by_machine(error) or f"{type(error).__name__}: {first_line(error)}").rstrip(".")
        log.warning("The figure %s is missing: %s. The run goes on without it.", name, told)


def as_float(images_NHW3: NDArray[Any]) -> Floats:
    """Return RGB in [0, 1], from uint8 0-255 or from floats."""
    scale = 255.0 if images_NHW3.dtype == np.uint8 else 1.0
    images: Floats = images_NHW3.astype(np.float64) / scale
    return images


def gray(image_HW3: Floats) -> Floats:
    """Return the image without its colors, so that colors laid over it stand out."""
    pale: Floats = image_HW3.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return pale


def overlay(image_HW3: Floats, color_hw3: Floats, share_hw: Floats) -> Floats:
    """Color the image's tokens, at most 85 % opaque so that the image stays visible."""
    size = (image_HW3.shape[0], image_HW3.shape[1])
    return blend(image_HW3, upsample(color_hw3, size), 0.85 * upsample(share_hw[..., None], size))


def upsample(grid_hwC: Floats, size: tuple[int, int]) -> Floats:
    """Upsample by nearest neighbor, so that a token's true extent stays visible."""
    rows = np.arange(size[0]) * grid_hwC.shape[0] // size[0]
    columns = np.arange(size[1]) * grid_hwC.shape[1] // size[1]
    upsampled: Floats = grid_hwC[rows][:, columns]
    return upsampled
