"""The gate of one image as a picture: a heat map per expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from visexpert.report.palette import INK, Floats, canvas

Pixels: TypeAlias = NDArray[np.uint8]

COLUMNS = 3


def gate_overlay(image_HW3: Floats, gates_HWK: Floats, palette: Mapping[str, str]) -> Pixels:
    """Draw the image, and once per expert in gray under the expert's color, the denser the greater its gate.

    All maps share one scale, from the image's smallest gate (clear) to its greatest (dense).

    Args:
        image_HW3: RGB in [0, 1].
        gates_HWK: Gate weights per token on their own grid; they sum to 1 over K.
        palette: K expert names in the gate's order, each with its color.

    Returns:
        uint8 RGB.
    """
    grey_HW = image_HW3.mean(axis=2)
    low, high = float(gates_HWK.min()), float(gates_HWK.max())
    rows = -(-(len(palette) + 1) // COLUMNS)
    figure = canvas(2.3 * COLUMNS, 2.5 * rows)
    panels: Any = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    panels[0].imshow(image_HW3)
    panels[0].set_title("image", fontsize=9, color=INK)
    extent = (-0.5, grey_HW.shape[1] - 0.5, grey_HW.shape[0] - 0.5, -0.5)
    gates_KHW = np.moveaxis(gates_HWK, 2, 0)
    for axes, (name, color), gates_HW in zip(panels[1:], palette.items(), gates_KHW, strict=False):
        dense = LinearSegmentedColormap.from_list(name, [(color, 0.0), (color, 0.85)])
        axes.imshow(grey_HW, cmap="gray", vmin=0, vmax=1)
        axes.imshow(gates_HW, cmap=dense, vmin=low, vmax=max(high, low + 1e-6), extent=extent, interpolation="nearest")
        axes.set_title(f"{name}  {gates_HW.mean():.2f}", fontsize=9, color=color, fontweight="bold")
    figure.suptitle(
        f"gate per patch, {low:.2f} clear to {high:.2f} dense (mean beside the name)", fontsize=8, color=INK
    )
    drawing: Any = FigureCanvasAgg(figure)  # typed in part
    drawing.draw()
    return np.asarray(drawing.buffer_rgba())[..., :3].copy()
