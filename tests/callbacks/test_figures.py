"""Regions of tokens, from masks drawn by hand; and that no process waits for one that does not ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visexpert.callbacks import RunFigures
from visexpert.callbacks import figures as module
from visexpert.callbacks.figures import EncoderFigures, token_regions
from visexpert.methods.views import EncoderViews, RoutingViews
from visexpert.types import Batch


def test_regions_of_a_mask_drawn_by_hand() -> None:
    # 4x4 tokens of 4x4 pixels: object 1 fills the first token, half of the second; object 2 half of the third.
    instance_BHW = torch.zeros(1, 16, 16, dtype=torch.long)
    instance_BHW[0, :4, :6] = 1
    instance_BHW[0, :4, 10:12] = 2
    regions = token_regions(instance_BHW, (4, 4))
    assert regions["object"][0, 0].tolist() == [True, False, False, False]
    assert regions["boundary"][0, 0].tolist() == [False, True, True, False]
    assert regions["background"][0, 1:].all()


def test_a_token_half_one_half_another_object_is_boundary() -> None:
    instance_BHW = torch.ones(1, 4, 4, dtype=torch.long)
    instance_BHW[0, :, 2:] = 2
    regions = token_regions(instance_BHW, (1, 1))
    assert regions["boundary"].all() and not regions["object"].any()


def test_regions_cover_each_token_once() -> None:
    generator = torch.Generator().manual_seed(0)
    instance_BHW = torch.randint(0, 3, (5, 24, 24), generator=generator)
    regions = token_regions(instance_BHW, (8, 8))
    counts = np.stack([mask.astype(int) for mask in regions.values()]).sum(axis=0)
    assert (counts == 1).all()


def test_an_empty_scene_is_background() -> None:
    regions = token_regions(torch.zeros(2, 8, 8, dtype=torch.long), (4, 4))
    assert regions["background"].all()


class CountingTrainer:
    """Its ``log_dir`` is a collective under several processes: all must ask equally often."""

    def __init__(self, folder: Path, *, first: bool) -> None:
        self.is_global_zero, self.asked, self._folder = first, 0, folder
        self.default_root_dir = str(folder)

    @property
    def log_dir(self) -> str:
        self.asked += 1
        return str(self._folder)


@pytest.mark.parametrize("hook", ["on_fit_end", "on_test_end"])
def test_every_process_asks_for_the_folder_equally_often(hook: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.0\n", encoding="utf-8")
    asked = []
    for first in (True, False):
        trainer: Any = CountingTrainer(tmp_path, first=first)
        getattr(RunFigures(), hook)(trainer, torch.nn.Identity())
        asked.append(trainer.asked)
    assert asked[0] == asked[1] > 0


class Viewed:
    """Stands for a method: two images a batch, two blocks, three experts; the first is chosen at one token of four."""

    def __init__(self, *, routed: bool = True, views: bool = True) -> None:
        self.routed, self.given, self.asked = routed, views, 0

    def views(self, batch: Batch) -> EncoderViews | None:
        self.asked += 1
        if not self.given:
            return None
        probs_BLHWE = torch.tensor([0.2, 0.5, 0.3]).repeat(2, 2, 2, 2, 1)
        probs_BLHWE[:, :, 0, 0] = torch.tensor([0.6, 0.3, 0.1])
        routing = RoutingViews((0, 2), probs_BLHWE, probs_BLHWE.argmax(-1)) if self.routed else None
        shares_BHW = torch.full((2, 2, 2), 0.25)
        return EncoderViews(batch.images_01(), {"clip": shares_BHW, "student": shares_BHW}, routing)


def batch() -> Batch:
    return Batch(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.arange(2), "test")


def test_gate_maps_show_half_as_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "gate_maps", lambda images, gates, *_: drawn.append((len(images), len(gates))))
    for wanted in (1, 5, 8):
        figures = RunFigures(num_maps=wanted)
        figures._images = [np.zeros((8, 8, 3), dtype=np.uint8)] * wanted
        figures._gates = [np.full((10, 2, 2, 2), 0.5)]
        figures._draw_gates(tmp_path, ("depth", "edges"))
    assert drawn == [(1, 1), (2, 2), (4, 4)]


def collected(method: Any, *, shown: int = 3, counted: int = 4, batches: int = 3) -> EncoderFigures:
    figures = EncoderFigures(shown=shown, counted=counted)
    for _ in range(batches):
        figures.add(method, batch())
    return figures


def test_usage_is_counted_over_so_many_images_and_maps_show_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[Any, ...]] = {}
    for name in ("cls_attention_maps", "router_maps", "router_usage"):
        monkeypatch.setattr(module, name, lambda *given, name=name, **_: drawn.update({name: given}))
    method = Viewed()
    collected(method).draw(tmp_path)
    assert method.asked == 2  # four images are enough
    images, attention, out = drawn["cls_attention_maps"]
    assert images.shape == (3, 8, 8, 3) and out.name == "cls_attention.png"
    assert set(attention) == {"frozen encoder", "student"}
    assert drawn["router_maps"][1].shape == (1, 2, 2, 2, 3) and drawn["router_maps"][2] == (0, 2)
    share_LE, probability_LE, layers, _ = drawn["router_usage"]
    assert layers == (0, 2)
    np.testing.assert_allclose(share_LE, [[0.25, 0.75, 0.0]] * 2)
    np.testing.assert_allclose(probability_LE, [[0.3, 0.45, 0.25]] * 2, rtol=1e-6)


def test_figures_are_written_for_what_there_is(tmp_path: Path) -> None:
    collected(Viewed(routed=False)).draw(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"cls_attention.png"}
    collected(Viewed()).draw(tmp_path / "routed")
    names = {"cls_attention.png", "router_maps.png", "router_usage.png"}
    assert {path.name for path in (tmp_path / "routed").iterdir()} == names


def test_a_batch_of_text_alone_is_passed_over(tmp_path: Path) -> None:
    method, figures = Viewed(), EncoderFigures(shown=3, counted=4)
    figures.add(method, replace(batch(), has_image_B=torch.tensor([False, False])))  # type: ignore[arg-type]
    figures.draw(tmp_path / "none")
    assert method.asked == 0 and not (tmp_path / "none").exists()


def test_a_method_without_views_is_asked_once(tmp_path: Path) -> None:
    method = Viewed(views=False)
    collected(method).draw(tmp_path / "none")
    assert method.asked == 1 and not (tmp_path / "none").exists()
