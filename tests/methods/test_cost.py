"""Operations counted by hand, parameters by role, and what the feature store saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.methods.helpers import bare_trainer, noise_batch, shake, tiny_tove
from visexpert.methods.cost import cached_gflop, first_images, measure_cost, parameter_counts, step_counter
from visexpert.tabletop import TabletopData
from visexpert.types import Batch


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_on_the_cpu_is_counted_as_its_matrix_products(causal: bool) -> None:
    """Forward 2 products of B H L L d multiply-adds, backward 5 (one repeats the scores)."""
    shape, product = (2, 3, 16, 8), 2 * (2 * 3 * 16 * 16 * 8)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with step_counter() as counter:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert counter.get_total_flops() == 2 * product
    with step_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(query, key, value)
    assert counter.get_total_flops() == 2 * product
    with step_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_a_linear_layer_takes_three_products_in_training_and_two_where_it_is_frozen() -> None:
    layer, x = torch.nn.Linear(8, 4, bias=False), torch.randn(5, 8, requires_grad=True)
    for frozen, products in ((False, 3), (True, 2)):
        layer.requires_grad_(not frozen)
        with step_counter() as counter:
            layer(x).sum().backward()
        assert counter.get_total_flops() == products * 2 * 5 * 8 * 4


def test_the_store_saves_what_the_frozen_encoders_take(
    tmp_path: Path, data: Callable[..., TabletopData], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = (shake(tiny_tove(folder=cache)) for cache in (str(tmp_path), None))
    bare_trainer(tmp_path, steps=1).fit(model, datamodule=(source := data()))
    batch = next(iter(source.train_dataloader()))
    before = torch.random.get_rng_state()
    model.train()
    saved = cached_gflop(model, first_images(batch, 2))
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad(), step_counter() as counter:
        model.clip(batch.images_01())
        for name in model.hub.names:
            model.hub[name](batch.images_01())
    resampled = 0.02  # what a cached token grid was resampled by, beside the encoders themselves
    assert saved == pytest.approx(counter.get_total_flops() / len(batch) / 1e9, rel=resampled)
    assert cached_gflop(plain, batch) == 0.0


def test_all_parameters_are_counted_and_detached_experts_are_not_deployed() -> None:
    model = tiny_tove(detached=["edges"])
    counts = parameter_counts(model)
    gone = sum(p.numel() for part in (model.hub["edges"], model.adapters["edges"]) for p in part.parameters())
    assert counts["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert counts["parameters_total"] - counts["parameters_inference"] == gone > 0
    assert counts["parameters_trained"] < counts["parameters_inference"]


def test_inference_is_counted_with_encoders_live_and_without_a_gradient() -> None:
    model, batch = tiny_tove().eval(), noise_batch(size=32)
    cost = measure_cost(model, batch, seconds=0.0)
    with torch.no_grad(), step_counter() as counter:
        model.encode(Batch(batch.images_BCHW, batch.index_B, split=""))
    assert cost["gflop_vision"] == pytest.approx(counter.get_total_flops() / len(batch) / 1e9)
    assert cost["gflop_language"] > 0 and cost["images_per_s"] > 0


def test_speed_is_the_median_of_repeats_with_their_spread_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats take 1, 1, 1, 2, 2 s: 2 images in a median of 1 s, quartiles of 1 and 2 s."""
    model, batch = tiny_tove().eval(), noise_batch(size=32)
    took, at, calls = iter([0.0, 1.0, 1.0, 1.0, 2.0, 2.0]), [0.0], model.encode  # the first call is counted, not timed

    def encode(batch: Batch) -> Any:
        at[0] += next(took)
        return calls(batch)

    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr("visexpert.methods.cost.time.perf_counter", lambda: at[0])
    cost = measure_cost(model, batch, seconds=1.0)
    assert cost["images_per_s"] == len(batch) and cost["images_per_s_spread"] == 1.0
    assert 0 <= cost.get("others_cpu_share", 0.0) <= 1
