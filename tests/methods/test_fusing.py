"""Detachment and merging of a method that is not ToVE: the mean of experts, added to CLIP's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.helpers import CLIP_FIELDS, VOCAB, WIDTH, tiny_experts
from tests.tabletop.quiet import QUIET
from visexpert.callbacks import KnowledgeMerging
from visexpert.callbacks.detach import ExpertDetachment
from visexpert.callbacks.phase import PhaseSettings
from visexpert.experts import ExpertHub, VisionExpert
from visexpert.grids import resample_tokens
from visexpert.language import CrossAttentionDecoder, LanguageModel, Projector
from visexpert.methods import EvaluationSettings, FusingMethod, MergingOptimizer, OptimizerSettings
from visexpert.optim import ParameterGroup
from visexpert.tabletop import TabletopData
from visexpert.types import Batch, VisionTokens
from visexpert.vision import ClipEncoder, MoLESettings, VisionEncoder

CPU = PhaseSettings(accelerator="cpu")
RATES = OptimizerSettings(warmup_steps=1)
UNSCORED = EvaluationSettings(caption_images=1, meteor=False)


class MeanFusing(FusingMethod):
    """t = t_clip + mean_k A_k e_k, before the projector; A_k linear."""

    fusion_space = "clip"

    def __init__(
        self, clip: VisionEncoder, language: LanguageModel, experts: Mapping[str, VisionExpert], *, clip_lr: float = 0.0
    ) -> None:
        projector = Projector(in_dim=clip.width, out_dim=language.width, kind="linear")
        hub = ExpertHub(experts)
        super().__init__(
            clip=clip, projector=projector, language=language, hub=hub, optimizer=RATES, evaluation=UNSCORED
        )
        self.clip_lr = clip_lr
        self.maps = nn.ModuleDict({name: nn.Linear(hub[name].token_dim, clip.width) for name in hub.names})

    def transferred(self, batch: Batch) -> VisionTokens:
        tokens: VisionTokens = self.clip(batch.images_01())
        told = [
            self.maps[name](resample_tokens(found.tokens_BSE, found.grid_hw, self.clip.grid_hw))
            for name, found in self.hub(batch).items()
        ]
        return replace(tokens, tokens_BTD=tokens.tokens_BTD + torch.stack(told).mean(0)) if told else tokens

    view_tokens = transferred

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        return {"hub": self.hub} if self.clip_lr > 0 else {"clip": self.clip, "hub": self.hub}

    def trained_groups(self) -> Sequence[ParameterGroup]:
        maps = tuple(self.maps[name] for name in self.hub.attached)
        groups = [ParameterGroup("fusion", (self.projector, *maps), self.lr)]
        return [*groups, ParameterGroup("clip", self.clip.read_modules(), self.clip_lr)] if self.clip_lr else groups

    def unused_modules(self) -> Sequence[nn.Module]:
        gone = [name for name in self.hub.names if name not in self.hub.attached]
        return [part[name] for part in (self.hub, self.maps) for name in gone]

    def fusion_fingerprint(self) -> str:
        return ",".join(self.hub.attached)

    def drop_experts(self, names: Iterable[str]) -> None:
        for name in names:
            self.hub.drop(name)
            del self.maps[name]

    def subset_modules(self) -> Sequence[nn.Module]:
        return [self.clip, *self.hub.attached_experts().values()]

    def plain(
        self,
        clip: VisionEncoder,
        projector: Projector,
        language: LanguageModel,
        *,
        clip_lr: float,
        keep_pooled: float = 0.0,
    ) -> MeanFusing:
        model = MeanFusing(clip, language, {}, clip_lr=clip_lr)
        model.projector = projector
        model.mark_loaded()
        return model

    def detached_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "left": list(self.hub.names)}

    def merged_config(
        self, settings: Mapping[str, Any], *, clip_lr: float, mole: MoLESettings | None, keep_pooled: float = 0.0
    ) -> dict[str, Any]:
        return {**settings, "clip_lr": clip_lr, "mole": mole}


def trained(folder: Path) -> MeanFusing:
    torch.manual_seed(0)
    language = CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=1, heads=2)
    model = MeanFusing(ClipEncoder(config=CLIP_FIELDS), language, tiny_experts())
    model.mark_loaded()
    config = '{"model": {"init_args": {"mine": 1}}, "data": {}, "trainer": {}}'
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return model


def scenes() -> TabletopData:
    sizes: dict[str, Any] = {"num_train": 4, "num_val": 4, "num_test": 2, "batch_size": 2, "eval_batch_size": 2}
    return TabletopData(rendering=QUIET, **sizes)


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    for draw in ("pareto_figure", "contribution_figure"):
        monkeypatch.setattr(f"visexpert.callbacks.detach.{draw}", lambda *_, **__: None)


def test_any_method_that_fuses_experts_can_be_detached(tmp_path: Path) -> None:
    model = trained(tmp_path)
    work = ExpertDetachment(keep=1, timing_images=2, timing_seconds=0.0, retune_steps=1, retune_lr=0.01)
    out = work.apply(model, scenes(), tmp_path, CPU)
    facts = json.loads((out / "detachment.json").read_text(encoding="utf-8"))
    assert len(facts["scores"]) == 8 and [*model.hub.names] == facts["kept"] and len(facts["kept"]) == 1
    assert f"left:\n    - {facts['kept'][0]}" in (out / "config.yaml").read_text(encoding="utf-8")
    assert model.lr == RATES.lr and model.warmup_steps == 1  # what re-tuning changed is back


def test_any_method_that_fuses_experts_can_be_merged(tmp_path: Path) -> None:
    model = trained(tmp_path)
    work = KnowledgeMerging(steps=2, optimizer=MergingOptimizer(lr=0.01, warmup_steps=1))
    out = work.apply(model, scenes(), tmp_path, CPU)
    assert "clip_lr: 0.01" in (out / "config.yaml").read_text(encoding="utf-8")
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith(("hub", "maps", "teacher"))]
    changed = [key for key, value in model.clip.state_dict().items() if not torch.equal(value, state[f"clip.{key}"])]
    assert changed
    facts = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    assert facts["fusion_space"] == "clip" and facts["experts"].keys() == {"semantic", "depth", "edges"}
