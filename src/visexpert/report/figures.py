"""What a model saw and said, as figures: pure functions from arrays to a PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from numpy.typing import NDArray

from visexpert.errors import DataError
from visexpert.report.palette import GRAY, INK, RIGHT, WRONG, Floats, canvas, colors, rgb, save, styled
from visexpert.report.panels import as_float, gray, overlay


def gate_maps(
    images_NHW3: NDArray[Any], gates_NHWK: Floats, names: Sequence[str], out: Path, *, columns: int = 2
) -> Path:
    """Lay the gate over test images, one color per expert.

    Three panels an image: the image; the expert with the greatest gate at each token, as opaque as its gate is great;
    and the expert whose gate is most above its own mean over all images, as opaque as it is above (twice is full).

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        gates_NHWK: Gate weights per token on their own grid; they sum to 1 over K.
        names: K expert names.
        out: The PNG to write.
        columns: Images beside each other.
    """
    images = as_float(images_NHW3)
    palette = rgb(colors(len(names)))
    mean_K = gates_NHWK.reshape(-1, len(names)).mean(axis=0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = canvas(4.9 * columns, 1.62 * rows + 0.8)
    grid = figure.add_gridspec(rows, 3 * columns, wspace=0.04, hspace=0.06)
    for index, (image, gates) in enumerate(zip(images, gates_NHWK, strict=True)):
        row, column = divmod(index, columns)
        pale = gray(image)
        lift_HWK = gates / np.maximum(mean_K, 1e-6)
        strongest = overlay(pale, palette[gates.argmax(axis=2)], gates.max(axis=2))
        above_mean = overlay(pale, palette[lift_HWK.argmax(axis=2)], np.clip(lift_HWK.max(axis=2) - 1, 0, 1))
        titles = ("image", "strongest", "most above its mean") if row == 0 else ("", "", "")
        for offset, (panel, title) in enumerate(zip((image, strongest, above_mean), titles, strict=True)):
            axes = figure.add_subplot(grid[row, 3 * column + offset])
            axes.imshow(panel, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(title, fontsize=9, color=INK)
    handles = [
        Patch(color=color, label=f"{name}  {share:.2f}")
        for name, color, share in zip(names, colors(len(names)), mean_K, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 3 * columns), frameon=False, fontsize=9
    )
    figure.suptitle("Which expert each token listens to (legend: mean gate)", fontsize=11, color=INK)
    return save(figure, out)


def gate_by_region(gates_NHWK: Floats, regions: Mapping[str, NDArray[Any]], names: Sequence[str], out: Path) -> Path:
    """Draw the mean gate of each expert on the tokens of each region, with its 95 % interval over images.

    Args:
        gates_NHWK: Gate weights per token.
        regions: Boolean token masks (N, H, W) by name, such as object, boundary, background. An image without a token
            of a region does not count for it.
        names: K expert names.
        out: The PNG to write.

    Raises:
        DataError: A region has no token in any image.
    """
    figure = canvas(1.6 + 1.1 * len(regions) * max(1.0, len(names) / 4), 3.4)
    axes = styled(figure.add_subplot(), title="Mean gate by region", ylabel="gate weight")
    width = 0.8 / len(names)
    for place, (region, mask_NHW) in enumerate(regions.items()):
        mean_K, interval_K = region_means(gates_NHWK, mask_NHW, region)
        for expert, color in enumerate(colors(len(names))):
            axes.bar(
                place + (expert - (len(names) - 1) / 2) * width,
                mean_K[expert],
                width * 0.92,
                yerr=interval_K[expert],
                color=color,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": INK},
                label=names[expert] if place == 0 else None,
            )
    axes.axhline(1 / len(names), color=GRAY, linewidth=0.9, linestyle="--", label="uniform")
    axes.set_xticks(range(len(regions)), list(regions))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, out)


def region_means(gates_NHWK: Floats, mask_NHW: NDArray[Any], region: str) -> tuple[Floats, Floats]:
    """Mean over images of each image's mean gate in a region, and the half width of its 95 % interval (both (K,)).

    Raises:
        DataError: No image has a token of the region.
    """
    per_image = [gates[mask] for gates, mask in zip(gates_NHWK, mask_NHW.astype(bool), strict=True) if mask.any()]
    if not per_image:
        raise DataError(f"Region '{region}' has no token in any of {len(gates_NHWK)} images: leave it out.")
    means_MK = np.stack([tokens.mean(axis=0) for tokens in per_image])
    spread_K = means_MK.std(axis=0, ddof=1) if len(means_MK) > 1 else np.zeros(means_MK.shape[1])
    return means_MK.mean(axis=0), 1.96 * spread_K / np.sqrt(len(means_MK))


def sample_captions(
    images_NHW3: NDArray[Any],
    captions: Sequence[str],
    correct: Sequence[bool | None],
    references: Sequence[str],
    out: Path,
    *,
    columns: int = 4,
) -> Path:
    """Show images with what the model wrote (green and ticked where right, red and crossed where wrong).

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        captions: N generated texts.
        correct: Whether each is right; None where nobody can tell, which is shown in ink and without a mark.
        references: N true texts, shown below.
        out: The PNG to write.
        columns: Images beside each other.
    """
    images = as_float(images_NHW3)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = canvas(2.6 * columns, 3.6 * rows, pad=0.1)
    samples = zip(images, captions, correct, references, strict=True)
    for place, (image, caption, right, reference) in enumerate(samples, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        color = INK if right is None else RIGHT if right else WRONG
        mark = "" if right is None else "✓ " if right else "✗ "
        for spine in axes.spines.values():
            spine.set_color(color)
            spine.set_linewidth(2.5)
        written = _wrapped(mark + caption)
        axes.set_title(written, fontsize=8, color=color, loc="left", fontweight="bold")
        axes.set_xlabel(_wrapped(reference), fontsize=7.5, color=GRAY, loc="left")
    figure.suptitle("Captions by the model (above) and truth (below)", fontsize=11, color=INK)
    return save(figure, out)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 32, max_lines=4, placeholder=" ...")
