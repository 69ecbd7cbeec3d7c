"""A student with MoLE for others: folded, measured, described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vision.test_clip import FIELDS
from visexpert.errors import ConfigError
from visexpert.vision import (
    ClipEncoder,
    MoLEFeedForward,
    MoLESettings,
    RouterUsage,
    TimmEncoder,
    UsageMeter,
    decision_margins,
    equipped_blocks,
    fold,
    merge_for_inference,
    mole_settings,
)

MODES = [("top1", "released"), ("top1", "scaled"), ("dense", "released")]


def student(**settings: Any) -> tuple[ClipEncoder, Tensor]:
    """A tiny CLIP whose MoLE is far from its start, and images."""
    torch.manual_seed(0)
    clip = ClipEncoder(config=FIELDS, mole=MoLESettings(**{"rank": 4, "alpha": 6.0, **settings})).eval()
    for mole in equipped_blocks(clip).values():
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    return clip.requires_grad_(False), torch.rand(3, 3, 24, 24)


def choose(clip: ClipEncoder, expert: int) -> None:
    """Let one expert have every token, as far as top-1 goes."""
    for mole in equipped_blocks(clip).values():
        mole.router.weight.data.zero_()
        mole.router.bias.data.zero_()[expert] = 50.0


def seen(clip: ClipEncoder, images: Tensor) -> RouterUsage:
    meter = UsageMeter(clip)
    for part in images.split(2):
        meter.update(part)
    return meter.usage()


def test_a_fold_averages_the_merged_experts() -> None:
    clip, _ = student(layers=[1])
    gates_E = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    plain = fold(clip, RouterUsage({1: gates_E}, 1))
    weights = equipped_blocks(clip)[1].merged_weights()
    mlp: Any = plain.model.encoder.layers[1].mlp
    for got, each in (
        (mlp.fc1.weight, weights["fc1"].weight_EOI),
        (mlp.fc1.bias, weights["fc1"].bias_EO),
        (mlp.fc2.weight, weights["fc2"].weight_EOI),
        (mlp.fc2.bias, weights["fc2"].bias_EO),
    ):
        assert each is not None
        expected = sum(float(gate) * weight for gate, weight in zip(gates_E, each, strict=True))
        torch.testing.assert_close(got.data, expected, atol=1e-5, rtol=1e-5)
    assert plain.state_dict().keys() == ClipEncoder(config=FIELDS).state_dict().keys()
    assert equipped_blocks(clip) and not equipped_blocks(plain)  # the student itself is as it was


@pytest.mark.parametrize(("routing", "router"), MODES)
def test_a_fold_is_exact_where_one_expert_gets_every_token(routing: Any, router: Any) -> None:
    clip, images = student(routing=routing, router=router)
    choose(clip, 2)
    plain = fold(clip, seen(clip, images))
    torch.testing.assert_close(plain(images).tokens_BTD, clip(images).tokens_BTD, atol=1e-5, rtol=1e-5)


def test_a_fold_is_not_exact_otherwise() -> None:
    clip, images = student()
    plain = fold(clip, seen(clip, images))
    assert not torch.allclose(plain(images).tokens_BTD, clip(images).tokens_BTD, atol=1e-2)


@pytest.mark.parametrize(("routing", "router"), MODES)
def test_usage_is_the_mean_gate(routing: Any, router: Any) -> None:
    clip, images = student(routing=routing, router=router)
    usage = seen(clip, images)
    hidden_BND = clip.model.pre_layrnorm(clip.model.embeddings(clip.preprocess(images)))
    block: Any = clip.model.encoder.layers[0]
    attended_BND, _ = block.self_attn(block.layer_norm1(hidden_BND), attention_mask=None)
    x_BND = block.layer_norm2(hidden_BND + attended_BND)
    probs = (x_BND @ block.mlp.router.weight.T + block.mlp.router.bias).softmax(-1)
    best = (probs == probs.amax(-1, keepdim=True)).float()
    gates = {"dense": probs, "scaled": best * probs}.get(routing if routing == "dense" else router, best)
    torch.testing.assert_close(usage.gates[0].float(), gates.mean((0, 1)), atol=1e-5, rtol=1e-5)
    assert usage.num_images == 3 and set(usage.gates) == {0, 1}
    if router == "released":
        assert all(float(gates_E.sum()) == pytest.approx(1) for gates_E in usage.gates.values())


def test_usage_of_nothing_is_refused() -> None:
    clip, images = student()
    with pytest.raises(ConfigError, match="no image was seen"):
        UsageMeter(clip).usage()
    with pytest.raises(ConfigError, match="has no MoLE"):
        UsageMeter(ClipEncoder(config=FIELDS)).update(images)


@pytest.mark.parametrize(("routing", "router"), MODES)
def test_settings_build_the_same_function(routing: Any, router: Any) -> None:
    clip, images = student(routing=routing, router=router, num_experts=2, layers=[1])
    settings = mole_settings(clip)
    assert settings is not None and settings.alpha == pytest.approx(6.0) and settings.layers == [1]
    again = ClipEncoder(config=FIELDS, mole=settings).eval()
    again.load_state_dict(clip.state_dict(), strict=True)
    assert torch.equal(again(images).tokens_BTD, clip(images).tokens_BTD)
    assert mole_settings(ClipEncoder(config=FIELDS)) is None


def test_margins_are_the_least_lead_of_an_image() -> None:
    clip, images = student(layers=[0], num_experts=2)
    choose(clip, 0)
    mole = equipped_blocks(clip)[0]
    mole.router.bias.data.copy_(torch.tensor([0.6, 0.4]).log())
    torch.testing.assert_close(decision_margins(clip, images), torch.full((3,), 0.2), atol=1e-6, rtol=1e-5)
    for router in ("released", "straight_through"):
        varied, _ = student(router=router)
        margins_B = decision_margins(varied, images)
        assert margins_B.shape == (3,) and 0 < float(margins_B.min()) < float(margins_B.max()) < 0.2
        torch.testing.assert_close(decision_margins(merge_for_inference(varied), images), margins_B, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"routing": "dense"}, {"num_experts": 1}])
def test_nothing_is_close_where_nothing_is_decided(settings: dict[str, Any]) -> None:
    clip, images = student(**settings)
    assert torch.equal(decision_margins(clip, images), torch.full((3,), torch.inf))
    assert torch.equal(decision_margins(ClipEncoder(config=FIELDS), images), torch.full((3,), torch.inf))


def test_weighed_experts_may_stay_as_they_are() -> None:
    clip, images = student(routing="dense")
    kept = merge_for_inference(clip, keep_weighed=True)
    assert kept is not clip and all(isinstance(mole, MoLEFeedForward) for mole in equipped_blocks(kept).values())
    assert torch.equal(kept(images).tokens_BTD, clip(images).tokens_BTD)
    with pytest.raises(ConfigError, match="has no merged form"):
        merge_for_inference(clip)


def test_what_learns_of_a_layer() -> None:
    for routing, router, balanced, learns in (
        ("top1", "released", False, False),
        ("top1", "released", True, True),
        ("dense", "released", False, True),
        ("top1", "scaled", False, True),
    ):
        clip, _ = student(routing=routing, router=router)
        mole = equipped_blocks(clip)[0]
        parts = mole.learning_modules(balanced=balanced)
        assert (mole.router in parts) == learns and {mole.fc1_experts, mole.fc2_experts} <= set(parts)


@torch.no_grad()
def test_an_encoder_with_gated_mlps_is_merged_folded_and_copied() -> None:
    arguments = {"embed_dim": 16, "depth": 3, "num_heads": 4, "img_size": 16, "patch_size": 8}
    mole = MoLESettings(rank=2)
    encoder = TimmEncoder(model="eva02_tiny_patch14_224", arguments=arguments, mole=mole).eval()
    images = torch.rand(3, 3, 16, 16)
    plain = encoder.plain_copy().eval()
    assert torch.equal(plain(images).tokens_BTD, encoder(images).tokens_BTD)
    for layer in encoder.mole_layers():
        assert len(layer.experts()) == 3
        for experts in layer.experts():
            nn.init.normal_(experts.B_weight)
        layer.router.bias[1] = 50.0
    expected = encoder(images).tokens_BTD
    assert not torch.allclose(plain(images).tokens_BTD, expected, atol=0.01)
    meter = UsageMeter(encoder)
    meter.update(images)
    folded = fold(encoder, meter.usage())
    assert list(folded.state_dict()) == list(plain.state_dict())
    for other in (merge_for_inference(encoder), folded):
        torch.testing.assert_close(other(images).tokens_BTD, expected, atol=1e-4, rtol=1e-4)
