"""What trains is in train mode, and all else in eval mode, for as long as it does not train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from tests.methods.helpers import (
    CLIP_FIELDS,
    VOCAB,
    WIDTH,
    bare_trainer,
    merging_of,
    noise_batch,
    shake,
    tiny_experts,
    tiny_tove,
)
from tests.methods.movekd.helpers import STAGE_1, tiny_movekd
from tests.methods.uneven import ListData
from visexpert.language import CrossAttentionDecoder, PrefixLM
from visexpert.methods import Method, ToVE, ToVEOptimizer
from visexpert.vision import ClipEncoder

MakeModel = Callable[..., Method]


class Seen(L.Callback):
    """Losses of the steps, and the modules that were in train mode in each."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.training: list[set[str]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.training.append({name for name, module in pl_module.named_modules() if module.training})


def fitted(folder: Path, model: Method, *, steps: int = 3) -> Seen:
    seen = Seen()
    trainer = bare_trainer(folder, steps=steps, callbacks=[seen], enable_checkpointing=False)
    trainer.fit(model, datamodule=ListData([noise_batch(seed=seed) for seed in range(steps)]))
    return seen


def decoder(dropout: float) -> CrossAttentionDecoder:
    return CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=1, heads=2, dropout=dropout)


def tove(dropout: float, **options: Any) -> Method:
    return tiny_tove(dropout=dropout, **options)


def movekd(dropout: float, **options: Any) -> Method:
    model = tiny_movekd(**options)
    torch.manual_seed(5)
    model.language = decoder(dropout)
    return model


def merging(dropout: float, **options: Any) -> Method:
    return merging_of(teacher=shake(tiny_tove(dropout=dropout)), lm_weight=1.0, warmup_steps=2, **options)


@pytest.mark.parametrize("make", [tove, movekd, merging])
def test_a_language_model_at_rate_0_drops_nothing(tmp_path: Path, make: MakeModel) -> None:
    with_dropout, without = (fitted(tmp_path, make(dropout, language_lr=0.0)) for dropout in (0.5, 0.0))
    assert with_dropout.losses == without.losses


@pytest.mark.parametrize("make", [tove, movekd])
def test_it_drops_nothing_until_it_joins(tmp_path: Path, make: MakeModel) -> None:
    waiting = {"language_lr": 1e-3, "language_frozen_steps": 2}
    with_dropout, without = (fitted(tmp_path, make(dropout, **waiting)) for dropout in (0.5, 0.0))
    assert with_dropout.losses[:2] == without.losses[:2]
    assert with_dropout.losses[2] != without.losses[2]


def test_a_clip_at_rate_0_is_in_eval_mode_and_its_mole_is_not(tmp_path: Path) -> None:
    seen = fitted(tmp_path, tiny_movekd(mole={"dropout": 0.1}, **STAGE_1), steps=1).training[0]
    blocks = "clip.model.encoder.layers"
    assert f"{blocks}.0.mlp.fc1_experts.dropout" in seen and f"{blocks}.0.mlp.router" in seen
    assert not {f"{blocks}.0.self_attn", f"{blocks}.0.mlp.fc1", f"{blocks}.2", "language", "anchor", "hub"} & seen


def test_mole_heads_and_gate_at_rate_0_are_in_eval_mode(tmp_path: Path) -> None:
    still = tiny_movekd(mole={"dropout": 0.1}, mole_lr=0.0, lr=0.0)
    seen = fitted(tmp_path, still, steps=1).training[0]
    still_parts = (".router", "_experts", "_experts.dropout", "depth.head", "projector")
    assert not {name for name in seen if name.endswith(still_parts)}
    assert {"distillation", "distillation.heads.depth.standardize"} <= seen  # statistics go on being learned
    quiet, noisy = (tiny_tove(noise="fixed", gate_lr=rate) for rate in (0.0, 1e-3))
    assert "gate" not in fitted(tmp_path, quiet, steps=1).training[0]
    assert "gate" in fitted(tmp_path, noisy, steps=1).training[0]


def test_a_model_that_comes_from_an_evaluation_trains_as_any(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.5, "noise": "fixed"}
    fresh, scored = tiny_tove(**options), tiny_tove(**options)
    scored.eval()
    assert fitted(tmp_path, fresh).losses == fitted(tmp_path, scored).losses


class Calls:
    """How often a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def test_a_frozen_language_model_goes_on_saving_memory(tmp_path: Path) -> None:
    """Activations of its blocks are computed anew for the gradient of what stands before it."""
    fields = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attention_dropout": 0.5,
    }
    language = PrefixLM(config=fields, gradient_checkpointing=True)
    frozen = ToVEOptimizer(language_lr=0.0)
    model = ToVE(clip=ClipEncoder(config=CLIP_FIELDS), experts=tiny_experts(), language=language, optimizer=frozen)
    attention = Calls(language.model.model.layers[0].self_attn)
    seen = fitted(tmp_path, model, steps=1)
    assert attention.number == 2
    assert "language.model.model.layers.0.self_attn" not in seen.training[0]
