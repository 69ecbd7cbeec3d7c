"""MoLE beside the MLPs of transformers and timm, gated and plain, against one expert after the other written out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, Dinov2Config, DINOv3ViTConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.dinov2.modeling_dinov2 import Dinov2MLP, Dinov2SwiGLUFFN
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTGatedMLP, DINOv3ViTMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from visexpert.errors import ConfigError
from visexpert.vision import MoLEFeedForward
from visexpert.vision.mole import MOLE_KEY

D, H, EXPERTS, RANK, ALPHA = 8, 12, 3, 2, 3.0
SIZES: Any = {"hidden_size": D, "intermediate_size": H, "num_attention_heads": 2}
ROUTERS = [("top1", "released"), ("top1", "scaled"), ("top1", "straight_through"), ("dense", "released")]
Linear = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """An MLP of a library and its formula, written out.

    Args:
        make: Builds it.
        compute: Its output from its weights, given what each of ``linears`` makes of its input.
        linears: The rows of its linear layers by role: name of the layer, first row, last row.
    """

    make: Callable[[], nn.Module]
    compute: Callable[[nn.Module, Linear, Tensor], Tensor]
    linears: Mapping[str, tuple[str, int, int]]


def normed(mlp: nn.Module, x: Tensor) -> Tensor:
    weight, bias = mlp.get_parameter("norm.weight"), mlp.get_parameter("norm.bias")
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def plain(act: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Linear, Tensor], Tensor]:
    return lambda mlp, linear, x: linear("fc2", act(linear("fc1", x)))


def swiglu(mlp: nn.Module, linear: Linear, x: Tensor) -> Tensor:
    gate = linear("gate", x)
    return linear("down", gate * torch.sigmoid(gate) * linear("up", x))


def swiglu_normed(mlp: nn.Module, linear: Linear, x: Tensor) -> Tensor:
    gate = linear("gate", x)
    return linear("down", normed(mlp, gate * torch.sigmoid(gate) * linear("up", x)))


def glu(mlp: nn.Module, linear: Linear, x: Tensor) -> Tensor:
    return linear("down", linear("up", x) * torch.sigmoid(linear("gate", x)))


SWIGLU_H = 16  # of Dinov2SwiGLUFFN: two thirds of 24, in eights
FC = {"fc1": ("fc1", 0, H), "fc2": ("fc2", 0, D)}
PROJ = {"gate": ("gate_proj", 0, H), "up": ("up_proj", 0, H), "down": ("down_proj", 0, D)}
TIMM = {"gate": ("fc1_g", 0, H), "up": ("fc1_x", 0, H), "down": ("fc2", 0, D)}
PACKED = {"gate": ("fc1", 0, H), "up": ("fc1", H, 2 * H), "down": ("fc2", 0, D)}
CASES = {
    "CLIP": Case(lambda: CLIPMLP(CLIPVisionConfig(**SIZES)), plain(lambda x: x * torch.sigmoid(1.702 * x)), FC),
    "SigLIP": Case(lambda: SiglipMLP(SiglipVisionConfig(**SIZES)), plain(lambda x: F.gelu(x, approximate="tanh")), FC),
    "DINOv2": Case(
        lambda: Dinov2MLP(Dinov2Config(hidden_size=D, mlp_ratio=2, num_attention_heads=2)),
        plain(gelu),
        {"fc1": ("fc1", 0, 2 * D), "fc2": ("fc2", 0, D)},
    ),
    "timm Mlp with a norm": Case(
        lambda: Mlp(D, H, norm_layer=nn.LayerNorm),
        lambda mlp, linear, x: linear("fc2", normed(mlp, gelu(linear("fc1", x)))),
        FC,
    ),
    "DINOv3 without biases": Case(
        lambda: DINOv3ViTMLP(DINOv3ViTConfig(**SIZES, mlp_bias=False)),
        plain(gelu),
        {"fc1": ("up_proj", 0, H), "fc2": ("down_proj", 0, D)},
    ),
    "DINOv3 gated": Case(lambda: DINOv3ViTGatedMLP(DINOv3ViTConfig(**SIZES, hidden_act="silu")), swiglu, PROJ),
    "DINOv3 gated without biases": Case(
        lambda: DINOv3ViTGatedMLP(DINOv3ViTConfig(**SIZES, hidden_act="silu", mlp_bias=False)), swiglu, PROJ
    ),
    "DINOv2 gated": Case(
        lambda: Dinov2SwiGLUFFN(Dinov2Config(hidden_size=D, mlp_ratio=3, num_attention_heads=2)),
        swiglu,
        {"gate": ("gate_proj", 0, SWIGLU_H), "up": ("up_proj", 0, SWIGLU_H), "down": ("down_proj", 0, D)},
    ),
    "timm SwiGLU": Case(lambda: SwiGLU(D, H), swiglu, TIMM),
    "timm SwiGLU with a norm": Case(lambda: SwiGLU(D, H, norm_layer=nn.LayerNorm), swiglu_normed, TIMM),
    "timm SwiGLUPacked": Case(lambda: SwiGLUPacked(D, 2 * H), swiglu, PACKED),
    "timm SwiGLUPacked with a norm": Case(
        lambda: SwiGLUPacked(D, 2 * H, norm_layer=nn.LayerNorm), swiglu_normed, PACKED
    ),
    "timm GluMlp, gate last": Case(
        lambda: GluMlp(D, 2 * H, bias=(False, True)),
        glu,
        {"up": ("fc1", 0, H), "gate": ("fc1", H, 2 * H), "down": ("fc2", 0, D)},
    ),
}
GATED = [name for name, case in CASES.items() if "gate" in case.linears]
each_case = pytest.mark.parametrize("name", CASES)


def equipped(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, MoLEFeedForward]:
    """The library's MLP, and MoLE beside a copy of it; every weight and bias is far from its start."""
    torch.manual_seed(0)
    own = CASES[name].make().to(dtype).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.5)
    settings = {"num_experts": EXPERTS, "rank": RANK, "alpha": ALPHA, "dropout": 0.0} | options
    mole = MoLEFeedForward(copy.deepcopy(own), **settings)
    for module in mole.added_modules():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return own, mole


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 7, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def one_by_one(name: str, own: nn.Module, mole: MoLEFeedForward, x_BND: Tensor) -> Tensor:
    """Each token on its own, each expert on its own: two small matrices with biases, added with their gate."""
    case, added = CASES[name], {key: value for key, value in mole.state_dict().items() if MOLE_KEY.search("." + key)}
    made = []
    for x_D in x_BND.reshape(-1, D):
        probs_E = torch.softmax(added["router.weight"] @ x_D + added["router.bias"], 0)
        best = int(probs_E.argmax())
        if mole.routing == "dense":
            gates = {expert: probs_E[expert] for expert in range(EXPERTS)}
        else:
            gates = {best: probs_E[best] if mole.router_kind == "scaled" else torch.tensor(1.0)}

        def linear(role: str, value: Tensor, gates: dict[int, Tensor] = gates) -> Tensor:
            layer, start, end = case.linears[role]
            has_bias = own.get_submodule(layer).bias is not None
            total = own.get_parameter(f"{layer}.weight")[start:end] @ value
            if has_bias:
                total = total + own.get_parameter(f"{layer}.bias")[start:end]
            for expert, gate in gates.items():
                down = added[f"{role}_experts.A_weight"][expert] @ value
                up = torch.zeros(end - start, dtype=value.dtype)
                if has_bias:
                    down = down + added[f"{role}_experts.A_bias"][expert * RANK : (expert + 1) * RANK]
                    up = added[f"{role}_experts.B_bias"][expert * (end - start) : (expert + 1) * (end - start)]
                up = up + down @ added[f"{role}_experts.B_weight"][expert]
                total = total + gate * ALPHA / RANK * up
            return total

        made.append(case.compute(own, linear, x_D))
    return torch.stack(made).view_as(x_BND)


@each_case
@pytest.mark.parametrize(("routing", "router"), ROUTERS)
@torch.no_grad()
def test_each_token_gets_its_experts_beside_every_linear_layer(name: str, routing: str, router: str) -> None:
    own, mole = equipped(name, routing=routing, router=router)
    x_BND = tokens()
    out_BND = mole(x_BND)
    torch.testing.assert_close(out_BND, one_by_one(name, own, mole, x_BND), atol=1e-11, rtol=1e-11)
    assert not torch.allclose(out_BND, own(x_BND), atol=0.1)
    assert len(mole.experts()) == len(CASES[name].linears) == len(mole.added_modules()) - 1


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("routing", "router"), [("top1", "scaled"), ("dense", "released")])
@torch.no_grad()
def test_at_step_0_it_is_the_librarys_mlp_to_the_bit(name: str, dtype: torch.dtype, routing: Any, router: Any) -> None:
    own = CASES[name].make().to(dtype)
    mole = MoLEFeedForward(copy.deepcopy(own), rank=RANK, routing=routing, router=router)
    keys = list(own.state_dict())
    assert [key for key in mole.state_dict() if not MOLE_KEY.search("." + key)] == keys
    assert {parameter.dtype for parameter in mole.parameters()} == {dtype} and mole.training
    for training in (True, False):
        for shape in ((2, 7, D), (5, D), (2, 3, 2, D)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(mole.train(training)(x), own.train(training)(x))
    strided = torch.randn(2, D, 7).to(dtype).transpose(1, 2)
    assert torch.equal(mole(strided), own(strided))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert torch.equal(mole(x), own(x))


@pytest.mark.parametrize("make", [Mlp, SwiGLU, SwiGLUPacked])
def test_an_mlps_own_dropout_stays_where_it_was(make: Any) -> None:
    own = make(D, 2 * H, norm_layer=nn.LayerNorm, drop=(0.3, 0.2))
    mole = MoLEFeedForward(copy.deepcopy(own), rank=RANK, dropout=0.0)
    outputs = []
    for mlp in (mole, own):
        torch.manual_seed(5)
        outputs.append(mlp(tokens(torch.float32)))
    assert torch.equal(*outputs) and not torch.equal(mole(tokens(torch.float32)), outputs[0])


@pytest.mark.parametrize("name", GATED)
def test_dropout_on_experts_acts_in_training_alone(name: str) -> None:
    _, mole = equipped(name, dropout=0.5)
    assert not mole.training and torch.equal(mole(tokens()), mole(tokens()))
    assert not torch.equal(mole.train()(tokens()), mole(tokens()))


@each_case
@pytest.mark.parametrize("router", ["released", "straight_through"])
@torch.no_grad()
def test_the_merged_form_is_exact_and_holds_the_librarys_mlps(name: str, router: str) -> None:
    own, mole = equipped(name, router=router)
    x_BND, merged = tokens(), mole.train().for_inference()
    assert not merged.training and mole.training
    mole.eval()
    torch.testing.assert_close(merged(x_BND), mole(x_BND), atol=1e-11, rtol=1e-11)
    choice_BN, weights = mole.router(x_BND).choice_BN, mole.merged_weights()
    assert len(choice_BN.unique()) > 1 and weights.keys() == {layer for layer, _, _ in CASES[name].linears.values()}
    for expert in range(EXPERTS):
        for layer, merged_linear in weights.items():
            state = {"weight": merged_linear.weight_EOI[expert]}
            if merged_linear.bias_EO is not None:
                state["bias"] = merged_linear.bias_EO[expert]
            own.get_submodule(layer).load_state_dict(state)
        rows = choice_BN == expert
        torch.testing.assert_close(own(x_BND)[rows], mole(x_BND)[rows], atol=1e-11, rtol=1e-11)


@each_case
@torch.no_grad()
def test_a_fold_is_the_librarys_own_mlp_and_exact_for_one_expert(name: str) -> None:
    own, mole = equipped(name)
    folded = copy.deepcopy(mole).folded(torch.tensor([0.0, 1.0, 0.0]))
    assert type(folded) is type(own) and repr(folded) == repr(own) and not folded.training
    assert vars(folded).keys() == vars(own).keys() and list(folded.state_dict()) == list(own.state_dict())
    mole.router.weight.zero_()
    mole.router.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    torch.testing.assert_close(folded(tokens()), mole(tokens()), atol=1e-11, rtol=1e-11)
    before = {key: value.clone() for key, value in mole.state_dict().items()}
    for parameter in folded.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in mole.state_dict().items())  # nothing is shared
    untouched = mole.folded(torch.zeros(EXPERTS))
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in untouched.state_dict().items())


@each_case
@torch.no_grad()
def test_a_fold_averages_the_merged_layers(name: str) -> None:
    _, mole = equipped(name)
    gates = [0.5, 0.3, 0.2]
    folded, weights = mole.folded(torch.tensor(gates)), mole.merged_weights()
    for layer, each in weights.items():
        weight = sum(gate * expert for gate, expert in zip(gates, each.weight_EOI, strict=True))
        torch.testing.assert_close(folded.get_parameter(f"{layer}.weight").data, weight, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_bfloat16_layers_are_merged_and_folded_with_one_rounding() -> None:
    own, mole = equipped("timm SwiGLUPacked", torch.bfloat16)
    up = mole.get_submodule("up_experts")
    A_ERI, B_ERO = up.get_parameter("A_weight").double(), up.get_parameter("B_weight").double()
    exact_OI = own.get_parameter("fc1.weight")[H:].double() + ALPHA / RANK * B_ERO[1].T @ A_ERI[1]
    merged = mole.merged_weights()["fc1"].weight_EOI[1, H:]
    folded = mole.folded(torch.tensor([0.0, 1.0, 0.0])).get_parameter("fc1.weight")[H:]
    assert merged.dtype == folded.dtype == torch.bfloat16
    # float32 sums may round to the neighbor where they fall between two numbers; a second rounding would do so often
    assert (merged == exact_OI.bfloat16()).double().mean() > 0.98 and torch.equal(merged, folded)


@torch.no_grad()
def test_a_packed_layer_has_the_experts_that_it_would_have_if_it_were_two() -> None:
    """A run's keys and numbers are the same whether a library packs gate and up or not."""
    own, packed = equipped("timm SwiGLUPacked")
    split = SwiGLU(D, H).double()
    weight, bias = own.get_parameter("fc1.weight"), own.get_parameter("fc1.bias")
    split.fc1_g.load_state_dict({"weight": weight[:H], "bias": bias[:H]})
    split.fc1_x.load_state_dict({"weight": weight[H:], "bias": bias[H:]})
    split.fc2.load_state_dict(own.get_submodule("fc2").state_dict())
    other = MoLEFeedForward(split, num_experts=EXPERTS, rank=RANK, alpha=ALPHA, dropout=0.0)
    added = {key: value for key, value in packed.state_dict().items() if MOLE_KEY.search("." + key)}
    assert added.keys() == {key for key in other.state_dict() if MOLE_KEY.search("." + key)}
    other.load_state_dict({**other.state_dict(), **added})
    torch.testing.assert_close(other(tokens()), packed(tokens()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(("routing", "router"), ROUTERS)
def test_every_expert_learns_and_checkpointing_changes_no_gradient(name: str, routing: str, router: str) -> None:
    _, mole = equipped(name, routing=routing, router=router)
    gradients = []
    for recomputed in (False, True):
        mole.zero_grad()
        x_BND = tokens().requires_grad_()
        out: Any = checkpoint(mole, x_BND, use_reentrant=False) if recomputed else mole(x_BND)
        out.square().sum().backward()
        gradients.append({key: value.grad.clone() for key, value in mole.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*gradients)
    learns = {key for key, _ in mole.named_parameters() if mole.router_learns or not key.startswith("router.")}
    assert gradients[0].keys() == learns
    assert all(part.B_weight.grad.abs().max() > 0 for part in mole.experts())  # type: ignore[union-attr]
    assert set(mole.learning_modules(balanced=False)) == {
        *mole.experts(),
        *((mole.router,) if mole.router_learns else ()),
    }


@pytest.mark.parametrize("name", ["DINOv3 gated", "timm SwiGLU with a norm", "timm GluMlp, gate last"])
@torch.no_grad()
def test_the_merged_form_of_a_gated_mlp_is_a_graph_with_a_dynamic_batch(name: str) -> None:
    _, mole = equipped(name, torch.float32)
    batch = torch.export.Dim("batch")
    graph = torch.export.export(mole.for_inference(), (tokens(torch.float32),), dynamic_shapes=({0: batch},)).module()
    x_BND = torch.randn(5, 7, D)
    torch.testing.assert_close(graph(x_BND), mole(x_BND), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_onnx_runs_the_merged_form_of_a_gated_mlp(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    _, mole = equipped("timm SwiGLUPacked with a norm", torch.float32)
    torch.onnx.export(
        mole.for_inference(),
        (tokens(torch.float32),),
        str(tmp_path / "mlp.onnx"),
        input_names=["x"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    x_BND = torch.randn(5, 7, D)
    (out_BND,) = onnxruntime.InferenceSession(tmp_path / "mlp.onnx").run(None, {"x": x_BND.numpy()})
    numpy.testing.assert_allclose(out_BND, mole(x_BND).numpy(), atol=1e-5, rtol=1e-4)


@each_case
def test_it_is_copied_and_pickled_whole(name: str) -> None:
    _, mole = equipped(name)
    for again in (copy.deepcopy(mole), pickle.loads(pickle.dumps(mole))):
        assert torch.equal(again(tokens()), mole(tokens()))
        gates_E = torch.tensor([0.2, 0.3, 0.5])
        torch.testing.assert_close(again.folded(gates_E)(tokens()), mole.folded(gates_E)(tokens()))


def test_a_child_with_a_name_of_moles_own_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.router = nn.Linear(D, H), nn.Linear(H, D), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc2(self.router(self.fc1(x)))
            return out

    with pytest.raises(ConfigError, match=r"Odd .*'router'.*layers"):
        MoLEFeedForward(Odd())
