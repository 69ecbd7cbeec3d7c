"""Regions of tokens, from masks drawn by hand; and that no process waits for one that does not ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visexpert.callbacks import RunFigures
from visexpert.callbacks.figures import token_regions


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
