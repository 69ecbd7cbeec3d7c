"""Operations by part and activations of a step on ``meta``, against hand counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from visexpert.planning.counting import count_step
from visexpert.planning.meta import weightless

ROWS, WIDTH = 5, 16
PRODUCT = 2 * ROWS * WIDTH * WIDTH
"""FLOP of one linear layer on the rows."""


@dataclass(frozen=True)
class Record:
    """As the rooms here hand tensors on."""

    values: Tensor


class Part(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def forward(self, record: Record) -> Record:
        return Record(self.layers(record.values))


class Pair(nn.Module):
    """Two parts, the second of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Part(2)

    def loss(self) -> Tensor:
        start = Record(torch.empty(ROWS, WIDTH, device="meta"))
        return self.second(self.first(start)).values.square().mean()  # type: ignore[no-any-return]

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        return {"first": [self.first], "second": [self.second]}


def test_parameters_have_no_memory_and_stay_tied_while_buffers_are_real() -> None:
    with weightless():
        model = nn.Sequential(nn.Embedding(7, 3), nn.BatchNorm1d(3), nn.Linear(3, 7, bias=False))
        model[2].weight = model[0].weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model[2].weight is model[0].weight
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_trained_layer_costs_three_products_where_its_input_needs_a_gradient_and_two_where_not() -> None:
    with weightless():
        model = Pair()
    cost = count_step(model.loss, model, model.parts)
    assert cost.forward == {"first": PRODUCT, "second": 2 * PRODUCT}
    assert cost.backward == {"first": PRODUCT, "second": 4 * PRODUCT}


def test_a_frozen_part_behind_a_trained_one_costs_two_products_and_before_it_one() -> None:
    with weightless():
        model = Pair()
    model.second.requires_grad_(False)
    assert count_step(model.loss, model, model.parts).backward == {"first": PRODUCT, "second": 2 * PRODUCT}
    model.second.requires_grad_(True)
    model.first.requires_grad_(False)
    assert count_step(model.loss, model, model.parts).backward == {"second": 3 * PRODUCT}


def test_a_part_inside_another_is_counted_by_itself_in_both_passes() -> None:
    with weightless():
        model = Pair()
    parts: dict[str, list[nn.Module]] = {"inner": [model.second.layers[1]], "outer": [model.second]}
    cost = count_step(model.loss, model, parts)
    assert cost.forward == {"the rest": PRODUCT, "outer": PRODUCT, "inner": PRODUCT}
    assert cost.backward == {"the rest": PRODUCT, "outer": 2 * PRODUCT, "inner": 2 * PRODUCT}


def test_what_checkpointing_runs_again_counts_as_backward_of_its_part() -> None:
    class Checkpointed(Part):
        def forward(self, record: Record) -> Record:
            return Record(checkpoint(self.layers, record.values, use_reentrant=False, early_stop=False))

    with weightless():
        model = Pair()
        model.second = Checkpointed(2)
    cost = count_step(model.loss, model, model.parts)
    assert cost.total("second") == (2 + 2 + 4) * PRODUCT


def test_fused_attention_is_counted_as_its_two_products_and_holds_no_logits() -> None:
    batch, heads, tokens, width = 1, 2, 256, 8
    query = torch.empty(batch, heads, tokens, width, device="meta")
    cost = count_step(lambda: F.scaled_dot_product_attention(query, query, query), nn.Identity(), {})
    assert sum(cost.forward.values()) == 2 * 2 * heads * tokens * tokens * width
    assert 0 < cost.activation_bytes < 4 * heads * tokens * tokens
    windows = query.unflatten(2, (16, 16)).flatten(0, 2)
    cost = count_step(lambda: F.scaled_dot_product_attention(windows, windows, windows), nn.Identity(), {})
    assert sum(cost.forward.values()) == 2 * 2 * heads * tokens * 16 * width


def test_activations_are_those_alive_at_once() -> None:
    with weightless():
        model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    start = torch.empty(ROWS, WIDTH, device="meta")
    size = 4 * ROWS * WIDTH
    with torch.no_grad():
        assert count_step(lambda: model(start), model, {}).activation_bytes == 2 * size
    kept = count_step(lambda: model(start), model, {}).activation_bytes
    assert 7 * size <= kept <= 9 * size  # tanh keeps its result, which is the next layer's input: one for each block
    half = count_step(lambda: model(start), model, {}, float_bytes=2).activation_bytes
    assert half == kept / 2


def test_real_masks_choose_and_unknown_values_are_true() -> None:
    with weightless():
        layer = nn.Linear(WIDTH, WIDTH)
    mask = torch.tensor([True, False, True, False, False])

    def step() -> Tensor:
        out: Tensor = layer(torch.empty(ROWS, WIDTH, device="meta"))
        assert bool(out.isfinite().all()) and torch.arange(3, device=out.device).tolist() == [0, 1, 2]
        won = torch.bincount(out.argmax(-1), minlength=WIDTH)
        assert won.shape == (WIDTH,)
        loss: Tensor = layer(out[mask]).sum() + 0 * won.float().sum()
        return loss

    forward, chosen = PRODUCT, PRODUCT * 2 // ROWS
    cost = count_step(step, layer, {"layer": [layer]})
    assert cost.forward["layer"] == forward + chosen
    assert cost.backward["layer"] == forward + 2 * chosen


def test_numbers_that_code_makes_up_stay_real_wherever_they_go() -> None:
    found: list[list[int]] = []

    def step() -> None:
        pixels = torch.empty(1, 3, device="meta")
        lengths = torch.tensor([2, 1], device=pixels.device)
        found.extend([lengths.tolist(), torch.full((2,), 7, device=pixels.device).tolist()])
        found.append(torch.arange(4).to(pixels.device)[torch.tensor([True, False, False, True])].tolist())
        assert lengths.to(pixels).is_meta  # not where they become pixels' equals

    count_step(step, nn.Identity(), {})
    assert found == [[2, 1], [7, 7], [0, 3]]
