"""Figures, checked by the pixels that are drawn and by numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from visexpert.errors import DataError
from visexpert.report import gate_by_region, gate_maps, sample_captions
from visexpert.report.figures import (
    HEAT,
    _entropy,
    cls_attention_maps,
    gate_figure,
    region_means,
    router_maps,
    router_usage,
)
from visexpert.report.palette import INK, OKABE_ITO, RIGHT, WRONG, Floats, as_written, canvas, colors, save
from visexpert.report.pareto import contribution_figure

NAMES = ["depth", "edges"]

GRAY_IMAGE = np.full((1, 16, 16, 3), 0.5)


def _pixels(path: Path) -> Floats:
    return np.asarray(Image.open(path).convert("RGB")) / 255.0


def _count(pixels: Floats, color: str | Floats) -> int:
    wanted = np.array(to_rgb(color)) if isinstance(color, str) else color
    return int((np.abs(pixels - wanted).max(axis=2) < 0.012).sum())


def _heat(value: float) -> Floats:
    """Color of a value in [0, 1] of the scale over the gray image."""
    return _laid(np.array(colormaps[HEAT](value)[:3]), 1.0)


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_each_experts_gate_has_a_map_on_one_scale_from_zero_to_the_greatest(tmp_path: Path) -> None:
    """Depth has .2 on the left half and .4 on the right, edges .8 and .6: the scale ends at .8."""
    gates = np.zeros((1, 4, 4, 2))
    gates[:, :, :2] = (0.2, 0.8)
    gates[:, :, 2:] = (0.4, 0.6)
    pixels = _pixels(gate_maps(GRAY_IMAGE, gates, NAMES, tmp_path / "gates.png"))
    middles = []
    for value in (0.25, 0.5, 1.0, 0.75):
        color = _heat(value)
        rows, columns = np.nonzero(np.abs(pixels - color).max(axis=2) < 0.012)
        inside = columns[columns < 0.85 * pixels.shape[1]]  # beyond lies the color bar
        assert len(inside) > 20_000  # half of a map of about 330 x 330
        middles.append(inside.mean())
    assert middles == sorted(middles)  # depth left of edges, and in each the left half first


def test_maps_of_a_nearly_uniform_gate_look_alike() -> None:
    """Gates of .19 to .21 differ by a twentieth of the scale: no expert looks chosen, though one is the strongest."""
    gates = np.full((2, 4, 4, 5), 0.2)
    gates[..., 0] += 0.01
    gates[..., 1] -= 0.01
    figure = gate_figure(np.full((2, 16, 16, 3), 0.5), gates, ["a", "b", "c", "d", "e"])
    maps_HW3 = figure.axes[0].images[0].get_array()
    assert maps_HW3 is not None
    across = np.asarray(maps_HW3)[8, 17 + 8 :: 17]  # the middles of the five maps
    assert across.shape == (5, 3)
    assert np.abs(across[0] - _heat(1.0)).max() < 1e-6 and np.abs(across[1] - _heat(0.19 / 0.21)).max() < 0.02
    bar = figure.axes[-1]
    assert bar.get_ylim() == pytest.approx((0.0, 0.21)) and "uniform, 1/5" in bar.get_ylabel()


@pytest.mark.parametrize(("images", "rows"), [(1, 2), (3, 3)])
def test_titles_of_the_maps_say_the_mean_gate(images: int, rows: int) -> None:
    gates = np.tile([0.1, 0.2, 0.3, 0.4], (images, 4, 4, 1))
    figure = gate_figure(np.full((images, 16, 16, 3), 0.5), gates, ["depth", "edges", "normals", "semantic"])
    assert [text.replace("\n", " ").strip() for text in _texts(figure)] == [
        "image",
        "depth mean 0.10",
        "edges mean 0.20",
        "normals mean 0.30",
        "semantic mean 0.40",
    ]
    assert len(figure.axes) == rows + 1  # a single image takes two rows of three panels; the last is the color bar


def test_mean_gate_by_region_is_the_mean_over_images() -> None:
    """Image 1 has gates .2 and .4 in the region (mean .3), image 2 has .5; image 3 has no such token."""
    depth = np.array([[[0.2, 0.4]], [[0.5, 0.9]], [[0.9, 0.9]]])
    gates = np.stack([depth, 1 - depth], axis=-1)
    mask = np.array([[[1, 1]], [[1, 0]], [[0, 0]]])
    mean, interval = region_means(gates, mask, "object")
    assert mean == pytest.approx([0.4, 0.6])
    sd = np.sqrt(2 * 0.1**2)
    assert interval == pytest.approx([1.96 * sd / np.sqrt(2)] * 2)


def test_bars_stand_as_high_as_the_gates(tmp_path: Path) -> None:
    """One expert at .75 and one at .25: the first bar is three times as high as the second."""
    gates = np.zeros((2, 2, 2, 2))
    gates[..., 0], gates[..., 1] = 0.75, 0.25
    everywhere = np.ones((2, 2, 2), dtype=bool)
    pixels = _pixels(gate_by_region(gates, {"object": everywhere}, NAMES, tmp_path / "bars.png"))
    pixels = pixels[:, : int(pixels.shape[1] * 0.6)]  # without the legend
    rows = [
        np.nonzero((np.abs(pixels - np.array(to_rgb(c))).max(axis=2) < 0.012).any(axis=1))[0] for c in OKABE_ITO[:2]
    ]
    high, low = (np.ptp(found) for found in rows)
    assert high / low == pytest.approx(3, rel=0.03)


def test_a_region_without_tokens_is_named(tmp_path: Path) -> None:
    nowhere = np.zeros((2, 2, 2), dtype=bool)
    with pytest.raises(DataError, match="'boundary' has no token in any of 2 images"):
        gate_by_region(np.full((2, 2, 2, 2), 0.5), {"boundary": nowhere}, NAMES, tmp_path / "bars.png")


def test_right_captions_are_green_and_wrong_ones_red(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3))
    texts = ["a red cube left of a blue sphere"] * 2
    path = sample_captions(images, texts, [True, True], texts, tmp_path / "right.png")
    assert _count(_pixels(path), RIGHT) > 1000
    assert _count(_pixels(path), WRONG) == 0
    path = sample_captions(images, texts, [True, False], texts, tmp_path / "both.png")
    assert _count(_pixels(path), WRONG) > 500
    assert _count(_pixels(path), RIGHT) > 500


def test_the_true_caption_beside_an_image_is_told_to_be_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("visexpert.report.figures.save", lambda figure, out: drawn.append(figure))
    sample_captions(np.zeros((1, 8, 8, 3)), ["a red cube"], [False], ["a blue sphere"], tmp_path / "captions.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "for example: a blue sphere" and axes.get_title(loc="left") == "✗ a red cube"


def test_figures_have_150_dots_an_inch_and_make_their_folder(tmp_path: Path) -> None:
    path = sample_captions(np.zeros((1, 8, 8, 3)), ["a"], [True], ["a"], tmp_path / "new" / "figure.png")
    with Image.open(path) as image:
        assert image.size == (round(2.6 * 150), round(3.6 * 150))


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_no_two_experts_share_a_color(count: int) -> None:
    assert len(set(colors(count))) == count


def _places(pixels: Floats, color: Floats) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Rows and columns of pixels of a color."""
    rows, columns = np.nonzero(np.abs(pixels - color).max(axis=2) < 0.012)
    return rows, columns


def _laid(color: Floats, share: float) -> Floats:
    """A color over the gray image."""
    return 0.5 * (1 - 0.85 * share) + 0.85 * share * color


def test_encoders_are_shown_side_by_side_on_one_scale(tmp_path: Path) -> None:
    """CLIP looks at the left half alone, at 2 times the mean; the student everywhere alike, at 1."""
    clip, student = np.zeros((1, 4, 4)), np.full((1, 4, 4), 1 / 16)
    clip[:, :, :2] = 1 / 8
    path = cls_attention_maps(GRAY_IMAGE, {"CLIP": clip, "student": student}, tmp_path / "new" / "cls.png")
    pixels = _pixels(path)
    scale = colormaps[HEAT]
    top, mean, none = (_laid(np.array(scale(value)[:3]), 1.0) for value in (1.0, 0.5**0.5, 0.0))
    (_, left), (_, right), (_, after) = (_places(pixels, color) for color in (top, none, mean))
    assert len(left) == pytest.approx(len(right), rel=0.05) and len(after) == pytest.approx(2 * len(left), rel=0.05)
    assert left.max() < right.min() and right.max() < after.min()


def test_entropy_in_titles_is_a_share_of_the_greatest() -> None:
    even, one, two = np.full((4, 4), 1 / 16), np.zeros((4, 4)), np.zeros((4, 4))
    one[0, 0] = 1.0
    two[0, :2] = 0.5
    assert _entropy(np.stack([even])) == pytest.approx(1.0)
    assert _entropy(np.stack([even, one])) == pytest.approx(0.5)
    assert _entropy(np.stack([two])) == pytest.approx(0.25)


def test_a_token_is_colored_by_the_expert_it_is_sent_to(tmp_path: Path) -> None:
    """In the first block the left half goes to expert 0 for sure; in the second all goes to expert 1, barely."""
    probs = np.zeros((1, 2, 4, 4, 2))
    probs[0, 0, :, :2, 0] = probs[0, 0, :, 2:, 1] = 1.0
    probs[0, 1] = (0.4999, 0.5001)
    pixels = _pixels(router_maps(GRAY_IMAGE, probs, (0, 3), tmp_path / "routing.png"))
    first, second = (np.array(to_rgb(color)) for color in OKABE_ITO[:2])
    (_, left), (_, right), (_, unsure) = (
        _places(pixels, color) for color in (_laid(first, 1.0), _laid(second, 1.0), _laid(second, 0.4))
    )
    assert len(left) == pytest.approx(len(right), rel=0.05) and len(unsure) == pytest.approx(2 * len(left), rel=0.05)
    assert left.max() < right.min() and right.max() < unsure.min()


@pytest.mark.parametrize(("count", "shown"), [(3, 3), (23, 6)])
def test_of_many_layers_some_are_shown(tmp_path: Path, count: int, shown: int) -> None:
    probs = np.zeros((1, count, 2, 2, 2))
    probs[..., 0] = 1.0
    path = router_maps(GRAY_IMAGE, probs, tuple(range(count)), tmp_path / "routing.png")
    row, columns = _places(_pixels(path), _laid(np.array(to_rgb(OKABE_ITO[0])), 1.0))
    filled = np.isin(np.arange(columns.max() + 2), columns[row == row.min() + 20])
    assert (np.diff(filled.astype(int)) == 1).sum() == shown
    with Image.open(path) as image:
        assert image.width <= 7.3 * 1.62 * 150


def test_bars_stand_as_high_as_the_shares_and_lines_as_the_probabilities(tmp_path: Path) -> None:
    shares, probabilities = np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])
    pixels = _pixels(router_usage(shares, probabilities, (2,), tmp_path / "use.png", over="9 images"))
    pixels = pixels[:, : int(pixels.shape[1] * 0.65)]  # without the legend
    rows = [_places(pixels, np.array(to_rgb(color)))[0] for color in OKABE_ITO[:2]]
    high, low = (int(np.ptp(found)) for found in rows)
    assert high / low == pytest.approx(3, rel=0.03)
    ink_rows, ink_columns = _places(pixels, np.array(to_rgb(INK)))
    line = ink_rows[(ink_columns > pixels.shape[1] * 0.4) & (ink_rows > rows[0].min())]
    assert rows[0].max() - np.median(line) == pytest.approx(high * 2 / 3, abs=4)


def test_a_router_of_many_layers_keeps_to_a_page(tmp_path: Path) -> None:
    even = np.full((23, 3), 1 / 3)
    with Image.open(router_usage(even, even, tuple(range(23)), tmp_path / "use.png", over="9 images")) as image:
        assert image.width <= 16 * 150


HOSTILE = [r"$\frac{$", "<script>", "half \ud800"]


def test_names_and_captions_are_shown_as_they_are(tmp_path: Path) -> None:
    """A dollar sign begins no formula, and what is no text costs no figure."""
    images = np.zeros((3, 8, 8, 3))
    sample_captions(images, HOSTILE, [True] * 3, HOSTILE, tmp_path / "captions.png")
    gate_maps(images, np.full((3, 2, 2, 3), 1 / 3), HOSTILE, tmp_path / "gates.png")
    contributions: list[Any] = [SimpleNamespace(expert=name, loss=0.5) for name in HOSTILE]
    contribution_figure(contributions, dict.fromkeys(HOSTILE, 1 / 3), tmp_path / "contributions.png")
    figure = canvas(3, 2)
    axes = figure.subplots()
    axes.set_title("$5 and $x^2$")
    as_written(figure)
    plain = canvas(3, 2)
    plain.subplots().set_title(r"\$5 and \$x^2\$")
    plain.savefig(tmp_path / "b.png")  # as matplotlib writes dollar signs
    assert save(figure, tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes.set_xscale("log")  # whose own labels are formulas
    save(figure, tmp_path / "log.png")
