"""MoLE's functions for a CPU against the formula written out with a mask, torch's own derivatives, and other paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.vision.test_mole import MODES, WIDTH, make, tokens
from visexpert.vision import MoLEFeedForward, mole_forward, mole_host
from visexpert.vision.mole_host import LinearWithUpdates, Segment, Updates, draw_dropped, segments_of

N, I, O, E, R = 7, 4, 3, 3, 2  # noqa: E741


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Use the functions for a CPU at any size, in parts of a few rows; return one entry for each call."""
    made: list[str] = []
    beside = mole_forward.LowRankExperts.beside

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append("call")
        return beside(*args, **kwargs)

    monkeypatch.setattr(mole_forward, "HOST_FROM", 0)
    monkeypatch.setattr(mole_host, "PART", 40)
    monkeypatch.setattr(mole_forward.LowRankExperts, "beside", counted)
    return made


def operands(*, biases: bool, gates: int | None) -> list[Tensor | None]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    bias = {"c": drawn(O), "a": drawn(E * R), "b": drawn(E * O)} if biases else {}
    weights = [drawn(O, I), bias.get("c"), drawn(E, R, I), bias.get("a"), drawn(E, R, O), bias.get("b")]
    return [drawn(N, I), *weights, None if gates is None else drawn(N, gates)]


def written_out(how: Updates, dropped: Tensor | None, values: list[Any]) -> Tensor:
    """Each token and expert on its own."""
    x, weight, c, A, a, B, b, gates = values
    kept = torch.ones(N * I, dtype=x.dtype)
    if dropped is not None:
        kept[dropped] = 0
    value = x * kept.view(N, I) / how.keep
    rows = []
    for segment in how.segments:
        for n in range(segment.rows.start, segment.rows.stop):
            row = weight @ x[n] + (0 if c is None else c)
            for place, e in enumerate(range(segment.experts.start, segment.experts.stop)):
                ranks = A[e] @ value[n] + (0 if a is None else a.view(E, R)[e])
                update = B[e].T @ ranks + (0 if b is None else b.view(E, O)[e])
                row = row + how.scale * (1 if gates is None else gates[n, place]) * update
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("dense", "gates"), [(True, E), (False, None), (False, 1)])
def test_a_layer_and_both_its_derivatives_are_right(
    share: float, biases: bool, dense: bool, gates: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mole_host, "PART", 12)  # parts of three rows
    values = operands(biases=biases, gates=gates)
    choice_N = torch.tensor([1, 0, 1, 1, 0, 1, 1])  # the last expert gets no token
    segments = (Segment(slice(0, N), slice(0, E)),) if dense else segments_of(choice_N, E)[0]
    how, dropped = Updates(segments, scale=0.7, keep=1 - share), draw_dropped(N * I, share)

    def layer(*given: Tensor | None) -> Tensor:
        value: Tensor = LinearWithUpdates.apply(how, dropped, *given)
        return value

    torch.testing.assert_close(layer(*values), written_out(how, dropped, values), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, tuple(values))  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(layer, tuple(values))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
def test_dropout_drops_each_value_with_its_probability(share: float) -> None:
    count, draws = 20_000, 50
    found = torch.zeros(count, dtype=torch.int64)
    for _ in range(draws):
        places = draw_dropped(count, share)
        assert places is not None
        assert bool((places.diff() > 0).all()) and 0 <= int(places[0]) and int(places[-1]) < count
        found[places] += 1
    deviation = (draws * count / 2 * share * (1 - share)) ** 0.5
    for half in found.chunk(2):
        assert abs(int(half.sum()) - draws * count / 2 * share) < 5 * deviation
    assert found.double().var().item() == pytest.approx(draws * share * (1 - share), rel=0.08)


def test_nothing_is_dropped_at_a_share_of_0() -> None:
    assert draw_dropped(100, 0.0) is None


def test_tokens_are_sorted_by_expert_and_come_back() -> None:
    segments, order_N, inverse_N = segments_of(torch.tensor([2, 0, 2, 2, 0]), 4)
    assert [(s.rows.start, s.rows.stop, s.experts.start) for s in segments] == [(0, 2, 0), (2, 5, 2)]
    assert order_N.tolist() == [1, 4, 0, 2, 3]
    assert order_N[inverse_N].tolist() == list(range(5))


@pytest.mark.parametrize(("routing", "router"), MODES)
def test_a_whole_mole_uses_them_and_checkpointing_changes_no_gradient(
    calls: list[str], routing: str, router: str
) -> None:
    mole = make(routing=routing, router=router, dropout=0.3).train()
    x_BND, found = tokens().requires_grad_(), []
    wanted = [x_BND, *(p for p in mole.parameters() if routing == "dense" or router != "released" or p.shape[0] != 3)]

    def checkpointed(x_BND: Tensor) -> Tensor:
        value: Tensor = checkpoint(mole, x_BND, use_reentrant=False)
        return value

    for run in (mole, checkpointed):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(x_BND).square().sum(), wanted, allow_unused=True))
    for plain, again in zip(*found, strict=True):
        assert (plain is None and again is None) or torch.equal(plain, again)
    assert bool(calls) == (router != "straight_through")


def watched(mole: MoLEFeedForward, x_BND: Tensor) -> Tensor:
    mole.fc1.register_forward_hook(lambda *_: None)
    return mole(x_BND)  # type: ignore[no-any-return]


def over_vmap(mole: MoLEFeedForward, x_BND: Tensor) -> Tensor:
    return torch.func.vmap(mole)(x_BND)  # type: ignore[no-any-return]


def over_jvp(mole: MoLEFeedForward, x_BND: Tensor) -> Tensor:
    return torch.func.jvp(mole, (x_BND,), (torch.ones_like(x_BND),))[0]  # type: ignore[no-any-return]


def exported(mole: MoLEFeedForward, x_BND: Tensor) -> Tensor:
    batch = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(mole, (x_BND,), strict=False, dynamic_shapes=(batch,)).module()
    found: Tensor = program(torch.cat([x_BND] * 3))  # larger than what it was traced with
    return found[: len(x_BND)]


@pytest.mark.parametrize("way", [watched, over_vmap, over_jvp, exported])
@pytest.mark.parametrize("routing", ["top1", "dense"])
def test_transforms_traces_and_hooks_take_the_other_way(
    calls: list[str],
    way: Callable[[MoLEFeedForward, Tensor], Tensor],
    routing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mole, x_BND = make(torch.float64, routing=routing).eval(), tokens(torch.float64)
    expected = mole(x_BND)
    assert calls
    calls.clear()
    monkeypatch.setattr(mole_forward, "HOST_FROM", 3 * 7 * WIDTH)  # a bound on sizes would restrict a graph's batch
    torch.testing.assert_close(way(mole, x_BND), expected, atol=1e-12, rtol=1e-12)
    assert not calls


def test_autocast_takes_the_other_way(calls: list[str]) -> None:
    mole = make().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert mole(tokens()).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("routing", ["top1", "dense"])
def test_at_step_0_the_output_is_the_mlps_own_to_the_bit(calls: list[str], routing: Any) -> None:
    mlp = make().eval()
    plain = nn.Sequential(mlp.fc1, mlp.activation_fn, mlp.fc2)
    x_BND = torch.randn(2, 37, WIDTH)
    expected = plain(x_BND)
    mole = make(routing=routing, dropout=0.5).train()
    mole.fc1.load_state_dict(mlp.fc1.state_dict())
    mole.fc2.load_state_dict(mlp.fc2.state_dict())
    for experts in mole.experts():
        assert experts.B_bias is not None
        nn.init.zeros_(experts.B_weight)
        nn.init.zeros_(experts.B_bias)
    assert torch.equal(mole(x_BND), expected)
    assert bool(calls) == (routing == "dense")  # top-1 leaves the tokens where they are, so that products round alike
