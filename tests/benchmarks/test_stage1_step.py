"""The released formulation and ours have the same loss on the same weights, so their times can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.released import MOLE_FILE, ReleasedStep, mole_of
from benchmarks.stage1_step import LIVE, OURS, RELEASED, NoiseImages, make_ours, make_released, variants_of
from visexpert.experts import FeatureCache
from visexpert.methods import MoVEKD
from visexpert.types import Batch

CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
TEACHERS = {"eva": ((4, 4), 8), "convnext": ((2, 2), 12)}


def share_mole(ours: MoVEKD, released: ReleasedStep) -> None:
    """Give the released MoLE our experts and routers."""
    for mole, block in zip(ours.clip.mole_layers(), released.blocks(), strict=False):
        theirs = block.mlp.mole
        theirs.router.load_state_dict(mole.router.state_dict())
        for own, experts in ((mole.fc1_experts, theirs.moe_down), (mole.fc2_experts, theirs.moe_up)):
            for number, expert in enumerate(experts):
                expert.lora_A.weight.data.copy_(own.A_weight[number])
                expert.lora_B.weight.data.copy_(own.B_weight[number].T)


@pytest.mark.filterwarnings("ignore")
def test_both_formulations_have_the_same_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = make_ours(CLIP, TEACHERS, dropout=0.0)
    ours.setup("fit")
    released = make_released(ours, CLIP, TEACHERS).eval()
    share_mole(ours, released)
    images, store = NoiseImages(2, 24), FeatureCache(tmp_path, dtype="float32")
    ours.read_features(store, {"train": images})
    batch = Batch(images.read([0, 1]), torch.arange(2), "train")
    variants = variants_of(ours, released, store)
    losses = {}
    for name, variant in variants.items():
        ours._cache = variant.store
        losses[name] = float(variant.loss(batch))
    assert losses[OURS] == pytest.approx(losses[LIVE], rel=1e-5)
    own_balance, all_balance = _balances(ours, released, batch)
    released_loss = losses[RELEASED] + 0.01 * (own_balance - all_balance)  # the release routes in one block more
    assert losses[OURS] == pytest.approx(released_loss, rel=1e-5)


def _balances(ours: MoVEKD, released: ReleasedStep, batch: Batch) -> tuple[float, float]:
    """Return the balance loss over the blocks that have MoLE here, and over all."""
    everything = float(released._balance())
    released.routings.pop()
    return float(released._balance()), everything


def test_a_baseline_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=str(MOLE_FILE.name)):
        mole_of(tmp_path)
