"""What a model saw, said and did inside, as figures: pure functions from arrays to a PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from visexpert.errors import DataError
from visexpert.report.palette import (
    GRAY,
    INK,
    RIGHT,
    WRONG,
    Floats,
    as_float,
    canvas,
    colors,
    gray,
    overlay,
    rgb,
    save,
    styled,
)

HEAT = "viridis"
"""Color map that reads alike with and without color vision, by its lightness."""

PANELS_WIDE = 3
"""Panels beside each other where a figure shows a single image."""


def gate_maps(
    images_NHW3: NDArray[Any], gates_NHWK: Floats, names: Sequence[str], out: Path, *, columns: int | None = None
) -> Path:
    """Draw how much each expert's gate is at each token of test images; see :func:`gate_figure`.

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        gates_NHWK: Gate weights per token on their own grid; they sum to 1 over K.
        names: K expert names.
        out: The PNG to write.
        columns: Images beside each other; None takes two where there are at most two experts, else one.
    """
    return save(gate_figure(images_NHW3, gates_NHWK, names, columns=columns), out)


def gate_figure(
    images_NHW3: NDArray[Any], gates_NHWK: Floats, names: Sequence[str], *, columns: int | None = None
) -> Figure:
    """Show each image, and beside it one map per expert of its gate, all on one scale from 0 to the greatest gate.

    One color scale for all maps keeps a nearly uniform gate from looking like a choice. Titles give each expert's mean
    over the tokens shown; the color bar marks the uniform gate, 1/K. A single image has three panels in a row.

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        gates_NHWK: Gate weights per token on their own grid; they sum to 1 over K.
        names: K expert names.
        columns: Images beside each other; None takes two where there are at most two experts, else one.
    """
    images, count = as_float(images_NHW3), len(names)
    scale = Normalize(0.0, max(float(gates_NHWK.max()), 1e-6))
    means_K = gates_NHWK.reshape(-1, count).mean(axis=0)
    titles = ["image\n", *(f"{name}\nmean {mean:.2f}" for name, mean in zip(names, means_K, strict=True))]
    strips = [
        [image, *(_heat(image, gates_HWK[..., expert], scale) for expert in range(count))]
        for image, gates_HWK in zip(images, gates_NHWK, strict=True)
    ]
    if len(strips) == 1:
        figure = _wrapped_panels(strips[0], titles)
    else:
        columns = min(columns or (2 if count <= 2 else 1), len(strips))
        rows = -(-len(strips) // columns)
        figure = canvas(columns * (1.5 * (1 + count) + 0.2) + 0.8, 1.56 * rows + 0.75)
        for index, strip in enumerate(strips):
            _panel_row(figure, index, len(strips), columns, strip, titles if index < columns else ())
    bar = _color_bar(figure, scale, f"gate: weight of the expert at a patch (white line: uniform, 1/{count})")
    bar.ax.axhline(1 / count, color="white", linewidth=1.5)
    figure.suptitle("Gate of each expert per patch, all maps on one scale", fontsize=11, color=INK)
    return figure


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
    axes = styled(
        figure.add_subplot(),
        title="Mean gate by region (bars: 95 % interval over images)",
        ylabel="mean gate (0 to 1; the experts' sum is 1)",
    )
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
        references: One of the texts that are true of each, shown below as an example.
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
        axes.set_xlabel(_wrapped(f"for example: {reference}"), fontsize=7.5, color=GRAY, loc="left")
    figure.suptitle("Captions by the model (above) and one of the true captions (below)", fontsize=11, color=INK)
    return save(figure, out)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 32, max_lines=4, placeholder=" ...")


def cls_attention_maps(
    images_NHW3: NDArray[Any], attention: Mapping[str, Floats], out: Path, *, columns: int = 2
) -> Path:
    """Show where the [CLS] token of each encoder looks, side by side for each image, on one scale.

    Values are times the mean over the image's tokens: 1 everywhere is attention to nothing in particular. Titles give
    the entropy of the attention, as a share of the greatest, mean over the images.

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        attention: By encoder, (N, h, w) on its own grid, each image's sum is 1.
        out: The PNG to write.
        columns: Images beside each other.
    """
    images = as_float(images_NHW3)
    lifts = {name: shares * shares[0].size for name, shares in attention.items()}
    titles = [f"{name}\nentropy {_entropy(shares):.3f}" for name, shares in attention.items()]
    top = max(2.0, float(np.quantile(np.concatenate([lift.ravel() for lift in lifts.values()]), 0.995)))
    scale = PowerNorm(0.5, 0.0, top)  # a few tokens get most of it: the others would all look alike
    columns = min(columns, len(images))
    figure = canvas(columns * (1.5 * (1 + len(lifts)) + 0.2) + 0.8, 1.56 * -(-len(images) // columns) + 0.75)
    for index, image in enumerate(images):
        panels = [image, *(_heat(image, lift[index], scale) for lift in lifts.values())]
        _panel_row(figure, index, len(images), columns, panels, ["image\n", *titles] if index < columns else ())
    _color_bar(figure, scale, "attention, times the mean over tokens", extend="max")
    figure.suptitle("Where the [CLS] token looks (mean over heads)", fontsize=11, color=INK)
    return save(figure, out)


def router_maps(
    images_NHW3: NDArray[Any],
    probs_NLHWE: Floats,
    layers: Sequence[int],
    out: Path,
    *,
    most_layers: int = 6,
) -> Path:
    """Lay each router's choice over images, one color per low-rank expert, stronger where the router is surer.

    Args:
        images_NHW3: RGB, uint8 0-255 or float in [0, 1].
        probs_NLHWE: Probability of each expert per image, layer and token; the greatest is the choice.
        layers: Blocks of the encoder that L runs over, from 0.
        out: The PNG to write.
        most_layers: Of more, as many are shown, evenly spread from the first to the last.
    """
    images, experts = as_float(images_NHW3), probs_NLHWE.shape[-1]
    palette, names = rgb(colors(experts)), expert_names(experts)
    shown = np.unique(np.linspace(0, len(layers) - 1, min(most_layers, len(layers))).round().astype(int))
    columns = 2 if len(shown) <= 3 and len(images) > 1 else 1
    figure = canvas(1.62 * columns * (1 + len(shown)) + 0.3, 1.66 * -(-len(images) // columns) + 1.0)
    for index, (image, probs_LHWE) in enumerate(zip(images, probs_NLHWE, strict=True)):
        panels = [image]
        for probs in probs_LHWE[shown]:
            sure = (probs.max(axis=2) - 1 / experts) / max(1 - 1 / experts, 1e-6)
            panels.append(overlay(gray(image), palette[probs.argmax(axis=2)], 0.4 + 0.6 * sure))
        titles = ["image", *(f"block {layers[place]}" for place in shown)]
        _panel_row(figure, index, len(images), columns, panels, titles if index < columns else ())
    share_E = np.bincount(probs_NLHWE.argmax(axis=-1).ravel(), minlength=experts) / probs_NLHWE[..., 0].size
    handles = [
        Patch(color=color, label=f"{name}  {share:.2f}")
        for name, color, share in zip(names, colors(experts), share_E, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(experts, 4), frameon=False, fontsize=9)
    some = "" if len(shown) == len(layers) else f", {len(shown)} of {len(layers)} layers"
    title = f"Low-rank expert that each token is sent to{some}\n"
    figure.suptitle(f"{title}(stronger color: surer router; legend: share of tokens)", fontsize=10, color=INK)
    return save(figure, out)


def router_usage(share_LE: Floats, probability_LE: Floats, layers: Sequence[int], out: Path, *, over: str) -> Path:
    """Draw how many tokens each low-rank expert gets in each layer, beside the mean probability it is given.

    Args:
        share_LE: Share of tokens for which the expert is the most probable; each row sums to 1.
        probability_LE: Its mean probability.
        layers: Blocks of the encoder that L runs over, from 0.
        out: The PNG to write.
        over: What the means are over, for the title: ``"128 test images"``.
    """
    experts = share_LE.shape[1]
    figure = canvas(min(16.0, max(5.2, 2.2 + 0.3 * len(layers) * (experts + 1))), 3.4)
    axes = styled(
        figure.add_subplot(),
        title=f"How routers use their experts ({over})",
        ylabel="share of patch tokens",
        xlabel="block of the encoder",
    )
    width = 0.8 / experts
    for expert, color in enumerate(colors(experts)):
        at = np.arange(len(layers)) + (expert - (experts - 1) / 2) * width
        axes.bar(at, share_LE[:, expert], width * 0.9, color=color, label=expert_names(experts)[expert])
        axes.hlines(probability_LE[:, expert], at - 0.45 * width, at + 0.45 * width, color=INK, linewidth=2)
    axes.axhline(1 / experts, color=GRAY, linewidth=0.9, linestyle="--")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=INK, linewidth=2, label="mean probability"))
    handles.append(Line2D([], [], color=GRAY, linewidth=0.9, linestyle="--", label="uniform"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, out)


def expert_names(count: int) -> list[str]:
    """Low-rank experts have no names of their own; they count from 0, as their weights do."""
    return [f"expert {index}" for index in range(count)]


def _panel_row(
    figure: Figure, index: int, images: int, columns: int, panels: Sequence[Floats], titles: Sequence[str]
) -> None:
    """Draw what belongs to one image as a single picture, which is laid out faster than many, below its titles."""
    axes = figure.add_subplot(-(-images // columns), columns, index + 1)
    height, width, _ = panels[0].shape
    gap_HW3 = np.ones((height, max(1, width // 20), 3))
    parts = [part for panel in panels for part in (panel, gap_HW3)]
    axes.imshow(np.concatenate(parts[:-1], axis=1), interpolation="nearest")
    axes.set_axis_off()
    for place, title in enumerate(titles):
        center = place * (width + gap_HW3.shape[1]) + width / 2
        axes.annotate(
            title,
            (center, -0.5),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )


def _wrapped_panels(panels: Sequence[Floats], titles: Sequence[str]) -> Figure:
    """Panels of one image, three in a row; the last row is filled up with white."""
    rows = -(-len(panels) // PANELS_WIDE)
    figure = canvas(2.3 * min(PANELS_WIDE, len(panels)) + 0.8, 2.5 * rows + 0.5)
    blank_HW3 = np.ones_like(panels[0])
    for row in range(rows):
        part = list(panels[row * PANELS_WIDE : (row + 1) * PANELS_WIDE])
        missing = PANELS_WIDE - len(part) if rows > 1 else 0
        above = titles[row * PANELS_WIDE : (row + 1) * PANELS_WIDE]
        _panel_row(figure, row, rows, 1, [*part, *[blank_HW3] * missing], above)
    return figure


def _heat(image_HW3: Floats, values_hw: Floats, scale: Normalize) -> Floats:
    heat_hw3 = colormaps[HEAT](scale(values_hw))[..., :3]
    return overlay(gray(image_HW3), heat_hw3, np.ones(values_hw.shape))


def _color_bar(figure: Figure, scale: Normalize, label: str, *, extend: str = "neither") -> Colorbar:
    bar = figure.colorbar(
        ScalarMappable(scale, HEAT), ax=figure.axes, fraction=0.02, aspect=35, pad=0.01, extend=extend
    )
    bar.set_label(label, fontsize=9, color=GRAY)
    bar.ax.tick_params(labelsize=8, colors=GRAY)
    return bar


def _entropy(shares_Nhw: Floats) -> float:
    """Mean over images of the entropy over tokens, as a share of the greatest."""
    shares_NT = shares_Nhw.reshape(len(shares_Nhw), -1)
    entropy_N = -(shares_NT * np.log(np.maximum(shares_NT, 1e-12))).sum(axis=1)
    return float(entropy_N.mean() / np.log(shares_NT.shape[1]))
