"""MoLE against one expert after the other written out, and its promises: identity, gradients, exact merging."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from tests.vision.test_clip import FIELDS
from visexpert.errors import ConfigError
from visexpert.losses import router_balance
from visexpert.vision import (
    ClipEncoder,
    MoLEFeedForward,
    add_mole,
    collect_routing,
    merge_for_inference,
    mole_forward,
)

WIDTH, HIDDEN, EXPERTS, RANK, ALPHA = 16, 32, 3, 4, 6.0
MODES = [("top1", "released"), ("top1", "scaled"), ("top1", "straight_through"), ("dense", "released")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def clip_config(width: int, hidden: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=2)


def make(dtype: torch.dtype = torch.float32, **options: Any) -> MoLEFeedForward:
    """A MoLE whose every weight and bias is far from its start, router included."""
    config = clip_config(WIDTH, HIDDEN)
    settings = {"num_experts": EXPERTS, "rank": RANK, "alpha": ALPHA, "dropout": 0.0} | options
    mole = MoLEFeedForward(CLIPMLP(config).to(dtype), **settings)
    for parameter in mole.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mole


def gradient_of(module: nn.Module, name: str) -> Tensor:
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    return gradient


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, WIDTH, dtype=dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def one_by_one(mole: MoLEFeedForward, x_BND: Tensor, scale: float = ALPHA / RANK) -> Tensor:
    """methods.md B1 literally: each expert on its own, as two linear layers with biases, then the weighted sum."""
    probs = (x_BND @ mole.router.weight.T + mole.router.bias).softmax(-1)
    best = nn.functional.one_hot(probs.argmax(-1), EXPERTS).to(probs.dtype)
    gates = {
        ("dense", "released"): probs,
        ("top1", "released"): best,
        ("top1", "scaled"): best * probs,
        ("top1", "straight_through"): best + probs - probs.detach(),
    }[mole.routing, mole.router_kind]

    def update(experts: Any, value: Tensor) -> Tensor:
        total = torch.zeros((), dtype=value.dtype)
        for e in range(EXPERTS):
            down = value @ experts.A_weight[e].T + experts.A_bias.view(EXPERTS, -1)[e]
            up = down @ experts.B_weight[e] + experts.B_bias.view(EXPERTS, -1)[e]
            total = total + gates[..., e : e + 1] * scale * up
        return total

    inner = x_BND @ mole.fc1.weight.T + mole.fc1.bias + update(mole.fc1_experts, x_BND)
    inner = inner * torch.sigmoid(1.702 * inner)
    return inner @ mole.fc2.weight.T + mole.fc2.bias + update(mole.fc2_experts, inner)


@pytest.mark.parametrize("host", [False, True], ids=["any device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("routing", "router"), MODES)
def test_outputs_and_gradients_equal_one_expert_after_the_other(
    host: bool, dtype: torch.dtype, routing: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host:
        monkeypatch.setattr(mole_forward, "HOST_FROM", 0)
    mole = make(dtype, routing=routing, router=router)
    x_BND = tokens(dtype).requires_grad_()
    wanted = [x_BND, *mole.parameters()]
    weights = torch.randn(2, 7, WIDTH, dtype=dtype) / 10
    outputs, gradients = [], []
    for function in (mole, lambda x: one_by_one(mole, x)):
        out = function(x_BND)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True))
    tolerance = TOLERANCE[dtype]
    assert outputs[0].abs().max() > 1
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("routing", "router"), MODES)
def test_the_router_learns_from_the_task_unless_top1_is_released(routing: str, router: str) -> None:
    mole = make(routing=routing, router=router)
    mole(tokens()).square().sum().backward()
    silent = (routing, router) == ("top1", "released")
    assert (mole.router.weight.grad is None) == silent
    if not silent:
        assert mole.router.weight.grad is not None and mole.router.weight.grad.abs().max() > 1e-3
    experts = [*mole.fc1_experts.parameters(), *mole.fc2_experts.parameters()]
    assert all(parameter.grad is not None for parameter in experts)  # DDP wants a gradient for each


def test_top1_outputs_do_not_depend_on_how_the_router_learns_unless_scaled() -> None:
    x_BND = tokens()
    outputs = {}
    for router in ("released", "scaled", "straight_through"):
        torch.manual_seed(1)
        outputs[router] = make(router=router)(x_BND)
    assert torch.equal(outputs["released"], outputs["straight_through"])
    assert not torch.allclose(outputs["released"], outputs["scaled"], atol=1e-2)


@pytest.mark.parametrize(("routing", "router"), MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_student_is_clip_to_the_bit_at_step_0(routing: Any, router: Any, dropout: float) -> None:
    clip, images = ClipEncoder(config=FIELDS, layer=-1), torch.rand(2, 3, 24, 24)
    before = clip(images)
    moles = add_mole(clip, rank=RANK, routing=routing, router=router, dropout=dropout)
    after = clip.train()(images)
    assert torch.equal(after.tokens_BTD, before.tokens_BTD) and after.cls_BD is not None and before.cls_BD is not None
    assert torch.equal(after.cls_BD, before.cls_BD)
    after.tokens_BTD.square().sum().backward()
    assert all(gradient_of(mole, "fc1_experts.B_weight").abs().max() > 0 for mole in moles)


def test_the_released_start_moves_each_linear_layer_by_a_sixteenth_of_its_input() -> None:
    """methods.md B2, 6: the update's rms is .063 of the input's."""
    torch.manual_seed(3)
    config = clip_config(256, 512)
    experts = MoLEFeedForward(CLIPMLP(config), init="released", dropout=0.0).fc1_experts
    x_ND = torch.randn(500, 256)
    one = nn.functional.one_hot(torch.zeros(500, dtype=torch.int64), 3).float()
    update = experts(x_ND, one, base_NO=torch.zeros(500, 512))
    assert float(update.detach().square().mean().sqrt()) == pytest.approx(0.0625, rel=0.1)
    assert experts.scale == 1 / 32


def test_parameters_at_clip_l_are_those_of_the_release() -> None:
    with torch.device("meta"):
        mole = MoLEFeedForward(CLIPMLP(clip_config(1024, 4096)))
    assert sum(p.numel() for module in mole.added_modules() for p in module.parameters()) == 1_001_667


def test_dropout_acts_in_training_only() -> None:
    mole, x_BND = make(dropout=0.5), tokens()
    assert not torch.equal(mole(x_BND), mole(x_BND))
    assert torch.equal(mole.eval()(x_BND), mole(x_BND))


def test_bfloat16_autocast_and_weights_work() -> None:
    mole, x_BND = make(), tokens()
    reference = mole(x_BND)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mole(x_BND)
    mixed.float().sum().backward()
    half = make(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(x_BND.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), reference, atol=0.3, rtol=0.1)


def test_the_work_that_profilers_count_is_the_rank_space_work() -> None:
    mole, x_BND = make(), tokens()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mole(x_BND)
    count, stacked = x_BND.shape[0] * x_BND.shape[1], EXPERTS * RANK
    plain = 2 * WIDTH * HIDDEN
    experts = (WIDTH + HIDDEN) * stacked + (HIDDEN + WIDTH) * (stacked + EXPERTS)
    assert counter.get_total_flops() == 2 * count * (plain + experts + WIDTH * EXPERTS)


@pytest.mark.parametrize("router", ["released", "straight_through"])
def test_the_merged_form_is_exact(router: str) -> None:
    mole, x_BND = make(router=router).eval(), tokens()
    assert relative_error(mole.for_inference()(x_BND), mole(x_BND)) < 1e-6
    precise = make(torch.float64, router=router).eval()
    x_BND = tokens(torch.float64)
    choices = precise.router(x_BND).choice_BN
    assert len(choices.unique()) > 1
    torch.testing.assert_close(precise.for_inference()(x_BND), precise(x_BND), atol=1e-12, rtol=1e-12)
    weights = precise.merged_weights()
    first = choices == choices[0, 0]
    plain = copy.deepcopy(precise)
    expert = int(choices[0, 0])
    for name in ("fc1", "fc2"):
        bias_EO = weights[name].bias_EO
        assert bias_EO is not None
        plain.get_submodule(name).load_state_dict({"weight": weights[name].weight_EOI[expert], "bias": bias_EO[expert]})
    by_hand = plain.fc2(plain.activation_fn(plain.fc1(x_BND[first])))
    torch.testing.assert_close(by_hand, precise(x_BND)[first], atol=1e-12, rtol=1e-12)


def test_the_merged_form_with_experts_that_get_no_token() -> None:
    mole = make().eval()
    with torch.no_grad():
        mole.router.bias[1] = 100.0
    x_BND = tokens()
    assert bool((mole.router(x_BND).choice_BN == 1).all())
    assert relative_error(mole.for_inference()(x_BND), mole(x_BND)) < 1e-6


def test_the_merged_form_costs_no_low_rank_work() -> None:
    merged, x_BND = make().for_inference(), tokens()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged(x_BND)
    assert counter.get_total_flops() == 2 * 2 * 7 * (2 * WIDTH * HIDDEN + WIDTH * EXPERTS)


@pytest.mark.parametrize(("routing", "router"), [("dense", "released"), ("top1", "scaled")])
def test_weighed_experts_have_no_merged_form(routing: str, router: str) -> None:
    with pytest.raises(ConfigError, match="has no merged form; use it as it is, or train with routing='top1'"):
        make(routing=routing, router=router).for_inference()


def equipped(**options: Any) -> tuple[ClipEncoder, Tensor]:
    """A tiny CLIP of three blocks that reads the second one's output, with MoLE far from its start."""
    torch.manual_seed(0)
    clip = ClipEncoder(config=FIELDS)
    for mole in add_mole(clip, **{"rank": RANK, "dropout": 0.0, **options}):
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    return clip, torch.rand(2, 3, 24, 24)


def test_layers_that_get_no_gradient_are_left_alone() -> None:
    clip, images = equipped()
    kinds = [isinstance(block.mlp, MoLEFeedForward) for block in clip.model.encoder.layers]
    assert kinds == [True, True, False]
    clip(images).tokens_BTD.sum().backward()
    experts = [p for n, p in clip.named_parameters() if "_experts." in n]
    assert len(experts) == 16 and all(parameter.grad is not None for parameter in experts)


def test_blocks_behind_the_tokens_are_run_for_their_routers_alone() -> None:
    """As in the release, with hidden state -2 of three blocks: the third counts in the balance and changes no token."""
    clip, images = equipped(layers="all")
    assert [isinstance(block.mlp, MoLEFeedForward) for block in clip.model.encoder.layers] == [True] * 3
    alone = clip(images)
    with collect_routing(clip) as routing:
        watched = clip(images)
    record = routing.record()
    assert record is not None and record.layers == (0, 1, 2) and not clip.routing_watched
    assert alone.cls_BD is not None and watched.cls_BD is not None
    assert torch.equal(alone.tokens_BTD, watched.tokens_BTD) and torch.equal(alone.cls_BD, watched.cls_BD)
    # What the third router reads is what transformers' own block makes for its MLP.
    seen: list[Tensor] = []
    third: Any = clip.model.encoder.layers[2]
    hook = third.layer_norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        clip.model(pixel_values=clip.preprocess(images))
    hook.remove()
    torch.testing.assert_close(record.probs_LBNE[2], third.mlp.router(seen[0]).probs_BNE)
    router_balance(record.probs_LBNE, record.choice_LBN).backward()
    assert third.mlp.router.weight.grad is not None and third.self_attn.q_proj.weight.grad is not None
    assert third.mlp.fc1_experts.A_weight.grad is None and third.mlp.fc2.weight.grad is None


@pytest.mark.parametrize("layers", [[3], [0, 0], [], [-1]])
def test_other_layers_are_refused(layers: list[int]) -> None:
    clip = ClipEncoder(config=FIELDS)
    with pytest.raises(
        ConfigError,
        match=r"must name different blocks of 0..2.*depends on 0..1, the others learn from the balance loss alone",
    ):
        add_mole(clip, layers=layers)
    assert not any(isinstance(module, MoLEFeedForward) for module in clip.modules())


def test_impossible_settings_are_refused() -> None:
    clip = ClipEncoder(config=FIELDS)
    for options, message in [
        ({"rank": 0}, "rank=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"routing": "top2"}, "routing='top2' is unknown; use one of top1, dense"),
        ({"router": "noisy"}, "router='noisy' is unknown; use one of released, scaled, straight_through"),
        ({"init": "zeros"}, "init='zeros' is unknown; use one of identity, released"),
        ({"routing": "dense", "router": "scaled"}, "a dense router learns from the task"),
    ]:
        with pytest.raises(ConfigError, match=message):
            add_mole(clip, **options)  # type: ignore[arg-type]
    add_mole(clip, layers=[1])
    with pytest.raises(ConfigError, match="has MoLE already"):
        add_mole(clip)
    assert not isinstance(clip.model.encoder.layers[0].mlp, MoLEFeedForward)


def test_keys_of_clip_stay_and_a_checkpoint_comes_back() -> None:
    clip, images = equipped()
    state = clip.state_dict()
    assert ClipEncoder(config=FIELDS).state_dict().keys() <= state.keys()
    added = {key.split(".mlp.")[1] for key in state.keys() - ClipEncoder(config=FIELDS).state_dict().keys()}
    parts = itertools.product(("fc1_experts", "fc2_experts"), ("A_weight", "A_bias", "B_weight", "B_bias"))
    assert added == {"router.weight", "router.bias", *(f"{layer}.{name}" for layer, name in parts)}
    fresh = ClipEncoder(config=FIELDS)
    add_mole(fresh, rank=RANK, dropout=0.0)
    assert not torch.equal(fresh(images).tokens_BTD, clip(images).tokens_BTD)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images).tokens_BTD, clip(images).tokens_BTD)


def test_the_fingerprint_follows_the_experts() -> None:
    clip, _ = equipped()
    first = clip.fingerprint()
    with torch.no_grad():
        clip.model.get_parameter("encoder.layers.0.mlp.fc2_experts.B_bias")[3] += 0.1
    assert clip.fingerprint() != first


def test_a_whole_clip_merges_for_inference() -> None:
    clip, images = equipped()
    state = {key: value.clone() for key, value in clip.state_dict().items()}
    merged = merge_for_inference(clip)
    torch.testing.assert_close(merged(images).tokens_BTD, clip.eval()(images).tokens_BTD, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, clip.state_dict()[key]) for key, value in state.items())
    assert not any(isinstance(module, MoLEFeedForward) for module in merged.modules())
    with collect_routing(merged) as ours, collect_routing(clip) as theirs:
        merged(images), clip(images)
    mine, other = ours.record(), theirs.record()
    assert mine is not None and other is not None and torch.equal(mine.choice_LBN, other.choice_LBN)


def test_decisions_are_collected_and_nothing_stays_behind() -> None:
    clip, images = equipped()
    with collect_routing(clip) as routing:
        clip(images)
    record = routing.record()
    assert record is not None and record.layers == (0, 1)
    assert record.probs_LBNE.shape == (2, 2, 10, 3) and record.choice_LBN.shape == (2, 2, 10)
    torch.testing.assert_close(record.probs_LBNE.sum(-1), torch.ones(2, 2, 10))
    assert torch.equal(record.choice_LBN, record.probs_LBNE.argmax(-1))
    record.probs_LBNE.square().sum().backward()
    router = clip.model.get_submodule("encoder.layers.0.mlp.router")
    assert gradient_of(router, "weight").abs().max() > 0 and not router._forward_hooks
    graph = weakref.ref(record.probs_LBNE)
    del record, routing
    gc.collect()
    assert graph() is None


def test_a_plain_clip_has_no_decisions() -> None:
    clip = ClipEncoder(config=FIELDS)
    with collect_routing(clip) as routing:
        clip(torch.rand(1, 3, 24, 24))
    assert routing.record() is None


def test_the_latest_pass_counts() -> None:
    clip, images = equipped()
    with collect_routing(clip) as routing:
        clip(torch.rand(5, 3, 24, 24))
        clip(images)
    record = routing.record()
    assert record is not None and record.probs_LBNE.shape[1] == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        clip, images = equipped(router="scaled")
        if checkpointed:
            clip.model.gradient_checkpointing_enable()
        runs: list[int] = []
        router = clip.model.get_submodule("encoder.layers.0.mlp.router")
        router.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with collect_routing(clip.train()) as routing:
            out = clip(images).tokens_BTD
        record = routing.record()
        assert record is not None
        (out.square().sum() + record.probs_LBNE.square().sum()).backward()
        assert len(runs) == 1 + checkpointed
        gradients.append({name: p.grad for name, p in clip.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
