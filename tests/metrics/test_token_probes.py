"""Linear probes of tokens: truth that is in the tokens is found, truth that is not is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visexpert.metrics.token_probes import TokenProbes, cell_targets

CLASSES = ("colour", "shape", "size", "material")


def scenes(count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random truth of 4x4 cells of 4x4 pixels, each cell one object or background."""
    generator = torch.Generator().manual_seed(seed)
    depth = 1 + 4 * torch.rand(count, 4, 4, generator=generator)
    labels = torch.randint(-1, 3, (count, 4, 4), generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(count, 3, 4, 4, generator=generator), dim=1)

    def up(values: Tensor) -> Tensor:
        return values.repeat_interleave(4, -1).repeat_interleave(4, -2)

    return {"depth_BHW": up(depth), "normals_B3HW": up(normals), **{f"{name}_BHW": up(labels) for name in CLASSES}}


def test_cell_targets_by_hand() -> None:
    targets = scenes(1)
    for name in CLASSES:
        targets[f"{name}_BHW"] = torch.full((1, 16, 16), -1)
    targets["colour_BHW"][0, :4, :3] = 5  # three quarters of the first cell
    targets["material_BHW"][0, :4, :3] = 1
    targets["depth_BHW"] = torch.full((1, 16, 16), torch.e)
    cells = cell_targets(targets, (4, 4))
    assert cells["object"][0].tolist() == [True] + [False] * 15
    assert cells["colour"][0, 0] == 5
    assert cells["depth"].shape == (1, 16, 1)
    assert cells["depth"].flatten().tolist() == pytest.approx([1.0] * 16)


def test_truth_in_the_tokens_is_found_and_noise_is_not() -> None:
    targets = scenes(60)
    cells = cell_targets(targets, (4, 4))
    onehot = torch.nn.functional.one_hot(cells["colour"], 3).float()
    tokens_BTD = torch.cat([cells["depth"], onehot, torch.randn(60, 16, 4)], dim=-1)
    probes = TokenProbes()
    probes.update(tokens_BTD, (4, 4), targets)
    scores = probes.compute()
    assert scores["depth"] > 0.999
    assert scores["object_depth"] > 0.999
    assert scores["colour"] > 0.99
    assert abs(scores["normals"]) < 0.1


def test_images_past_the_limit_are_ignored() -> None:
    targets = scenes(20)
    few, many = TokenProbes(max_images=12), TokenProbes(max_images=12)
    tokens_BTD = torch.randn(20, 16, 3, generator=torch.Generator().manual_seed(1))
    few.update(tokens_BTD[:12], (4, 4), {name: value[:12] for name, value in targets.items()})
    many.update(tokens_BTD, (4, 4), targets)
    assert few.compute() == many.compute()


def test_nothing_seen_gives_nothing() -> None:
    assert TokenProbes().compute() == {}


def test_scores_that_too_few_tokens_stand_for_are_left_out() -> None:
    targets = scenes(8)
    for name in CLASSES:
        targets[f"{name}_BHW"] = torch.full((8, 16, 16), -1)
        targets[f"{name}_BHW"][:, :4, :4] = 1  # eight tokens on objects
    probes = TokenProbes()
    probes.update(torch.randn(8, 16, 3), (4, 4), targets)
    assert set(probes.compute()) == {"depth", "normals"}
