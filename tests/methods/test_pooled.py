"""keep_pooled: what it adds to the loss, what it trains, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from tests.methods.helpers import (
    VOCAB,
    WIDTH,
    merging_of,
    noise_batch,
    shake,
    sorted_settings,
    tiny_experts,
    tiny_tove,
    trained_names,
)
from visexpert.errors import ConfigError
from visexpert.language import CrossAttentionDecoder, NoLanguage
from visexpert.methods import Method, MoVEKD, ToVE
from visexpert.vision import ClipEncoder, MoLESettings, VisionEncoder

BEHIND = {f"clip.model.{name}" for name in ("encoder.layers.1.mlp.fc1.weight", "post_layernorm.weight")}
"""Some of what only the pooled output depends on: the tokens are those of layer -2 of 2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 2},
        projection_dim=12,
    )
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    return path


def movekd(clip: VisionEncoder, **options: Any) -> MoVEKD:
    settings = sorted_settings(MoVEKD, {"experts": tiny_experts(), "lm_weight": 0.0, "warmup_steps": 2, **options})
    model = MoVEKD(clip=clip, language=NoLanguage(), **settings)
    model.clip.load_weights()
    if model.anchor is not None:
        model.anchor.load_weights()
    model.hub.load_weights()
    model.settle_training()
    return model


def grow(part: nn.Module) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def expected(model: Method, frozen: VisionEncoder) -> Tensor:
    images = noise_batch().images_01()
    return (1 - F.cosine_similarity(model.clip.embed(images), frozen.embed(images), dim=-1)).mean()


def test_movekd_adds_the_cosine_of_projected_embeddings_and_trains_the_pooled_path(folder: Path) -> None:
    model = movekd(ClipEncoder(source=str(folder), layer=-2), keep_pooled=0.7)
    grow(model.clip)
    assert model.clip.projection_PE is not None and model.clip.projection_PE.shape == (16, 12)
    assert trained_names(model) >= BEHIND
    output = model.step(noise_batch())
    assert model.anchor is not None and output.terms["pooled_loss"].weight == 0.7
    torch.testing.assert_close(output.terms["pooled_loss"].value, expected(model, model.anchor))
    output.loss.backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is not None and named[name].grad.any() for name in BEHIND)  # type: ignore[union-attr]
    unused = [name for name in trained_names(model) if named[name].grad is None]
    assert not unused


def test_the_student_is_encoded_once_and_so_is_the_frozen_clip(folder: Path) -> None:
    model = movekd(ClipEncoder(source=str(folder), layer=-2), keep_pooled=1.0)
    calls = {"student": 0, "frozen": 0}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls[name] + 1})

    assert model.anchor is not None
    model.clip.blocks()[0].register_forward_hook(count("student"))
    model.anchor.blocks()[0].register_forward_hook(count("frozen"))
    model.step(noise_batch())
    assert calls == {"student": 1, "frozen": 1}


def test_without_a_weight_nothing_changes(folder: Path) -> None:
    plain = movekd(ClipEncoder(source=str(folder), layer=-2))
    assert "pooled_loss" not in plain.step(noise_batch()).terms
    assert not trained_names(plain) & BEHIND


def test_mole_behind_a_frozen_clip_still_learns_to_keep_it(folder: Path) -> None:
    model = movekd(ClipEncoder(source=str(folder), layer=-1, mole=MoLESettings()), keep_pooled=1.0, clip_lr=0.0)
    grow(model.clip)
    model.eval()  # routers are noisy in training
    output = model.step(noise_batch())
    assert model.anchor is not None
    torch.testing.assert_close(output.terms["pooled_loss"].value, expected(model, model.anchor))
    output.terms["pooled_loss"].value.backward()
    assert any(p.grad is not None and p.grad.any() for layer in model.clip.mole_layers() for p in layer.parameters())


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_merging_keeps_the_teachers_clip(adaptation: str) -> None:
    model = merging_of(teacher=shake(tiny_tove()), adaptation=adaptation, keep_pooled=0.5)
    grow(model.clip)
    output = model.step(noise_batch())
    torch.testing.assert_close(output.terms["pooled_loss"].value, expected(model, model.teacher.clip))
    output.loss.backward()
    named = dict(model.named_parameters())
    behind = [name for name in trained_names(model) if "encoder.layers.1." in name]
    assert behind and all(named[name].grad is not None for name in behind)
    merged = model.merged()
    assert trained_names(merged) >= BEHIND  # so that its checkpoint holds them


def test_tove_keeps_its_source(folder: Path) -> None:
    language = CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=1, heads=2)
    clip = ClipEncoder(source=str(folder), layer=-2)
    options = {"experts": tiny_experts(), "clip_lr": 1e-3, "keep_pooled": 1.0}
    model = ToVE(clip=clip, language=language, **sorted_settings(ToVE, options))
    model.clip.load_weights()
    grow(model.clip)
    original = ClipEncoder(source=str(folder), layer=-2)
    output = model.step(noise_batch())
    torch.testing.assert_close(output.terms["pooled_loss"].value, expected(model, original))
    assert trained_names(model) >= BEHIND
    assert not any("frozen" in name for name in model.state_dict())


def test_what_cannot_be_kept_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_pooled=0.5.*clip_lr=0"):
        tiny_tove(keep_pooled=0.5)
    with pytest.raises(ConfigError, match=r"keep_pooled.*-1"):
        movekd(ClipEncoder(source=str(folder), layer=-2), keep_pooled=-1.0)
    model = tiny_tove(keep_pooled=0.5, clip_lr=1e-3)
    with pytest.raises(ConfigError, match="keep_pooled needs .* source"):
        model.check_start()  # before anything trains
