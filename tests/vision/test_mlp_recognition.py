"""Which MLPs are recognized, by what they compute: those that only look like one are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.vision import MoLEFeedForward
from visexpert.vision.mlp_recognition import form_of
from visexpert.vision.mole_forward import MLPForm

D, H = 8, 12


class Written(nn.Module):
    """An MLP of three or two linear layers with a forward of its own."""

    def __init__(
        self, compute: Callable[[Any, Tensor], Tensor], *, packed: bool = False, **children: nn.Module
    ) -> None:
        super().__init__()
        if packed:
            self.w12 = nn.Linear(D, 2 * H)
        else:
            self.w1, self.w2 = nn.Linear(D, H), nn.Linear(D, H)
        self.w3 = nn.Linear(H, D)
        self.compute = compute
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class TwoLayers(nn.Module):
    """An MLP of two linear layers whose activation is a function."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc2, self.fc1 = nn.Linear(H, D), nn.Linear(D, H)  # named against the order of the calls
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def packed_silu(mlp: Any, x: Tensor) -> Tensor:
    """As in DINOv2's own SwiGLUFFN."""
    first, second = mlp.w12(x).chunk(2, dim=-1)
    out: Tensor = mlp.w3(F.silu(first) * second)
    return out


WITHOUT_A_CHILD: dict[str, tuple[Callable[[], nn.Module], MLPForm]] = {
    "DINOv2's packed SwiGLU": (
        lambda: Written(packed_silu, packed=True),
        MLPForm({"w12": ("gate", "up"), "w3": ("down",)}, "silu"),
    ),
    "three layers, the gate called last": (
        lambda: Written(lambda mlp, x: mlp.w3(mlp.w1(x) * F.gelu(mlp.w2(x), approximate="tanh"))),
        MLPForm({"w1": ("up",), "w2": ("gate",), "w3": ("down",)}, "gelu_tanh"),
    ),
    "a norm behind a function": (
        lambda: Written(lambda mlp, x: mlp.w3(mlp.norm(F.silu(mlp.w1(x)) * mlp.w2(x))), norm=nn.LayerNorm(H)),
        MLPForm({"w1": ("gate",), "w2": ("up",), "w3": ("down",)}, "silu", between=("norm",)),
    ),
    "no activation at all": (
        lambda: Written(lambda mlp, x: mlp.w3(mlp.w1(x) * mlp.w2(x))),
        MLPForm({"w1": ("gate",), "w2": ("up",), "w3": ("down",)}),
    ),
    "two layers": (
        lambda: TwoLayers(lambda mlp, x: mlp.fc2(F.gelu(mlp.fc1(x)))),
        MLPForm({"fc1": ("fc1",), "fc2": ("fc2",)}, "gelu"),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_A_CHILD)
@torch.no_grad()
def test_activations_that_are_functions_are_recognized(name: str) -> None:
    make, form = WITHOUT_A_CHILD[name]
    mlp, x_BND = make(), torch.randn(2, 5, D)
    assert form_of(mlp) == form
    mole = MoLEFeedForward(mlp, rank=2, dropout=0.0)
    assert torch.equal(mole(x_BND), mlp(x_BND))
    for experts in mole.experts():
        nn.init.normal_(experts.B_weight)
    torch.testing.assert_close(mole.for_inference()(x_BND), mole(x_BND), atol=1e-5, rtol=1e-5)


class Scaled(TwoLayers):
    """An MLP with a scale of its own that starts at one."""

    def __init__(self) -> None:
        super().__init__(lambda mlp, x: mlp.gamma * mlp.fc2(F.gelu(mlp.fc1(x))))
        self.gamma = nn.Parameter(torch.ones(D))


class Doubled(nn.Linear):
    """A linear layer that does not compute what its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_doubled_layer() -> nn.Module:
    mlp = TwoLayers(lambda mlp, x: mlp.fc2(F.gelu(mlp.fc1(x))))
    mlp.fc1 = Doubled(D, H)
    return mlp


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def residual(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = x + mlp.w3(F.silu(mlp.w1(x)) * mlp.w2(x))
    return out


LOOK_LIKE_ONE: dict[str, Callable[[], nn.Module]] = {
    "a scale that is one now": Scaled,
    "a layer that computes something else": with_doubled_layer,
    "a residual inside": lambda: Written(residual),
    "a dropout that is a function": lambda: TwoLayers(
        lambda mlp, x: mlp.fc2(F.dropout(F.gelu(mlp.fc1(x)), 0.5, mlp.training))
    ),
    "an activation in float32": lambda: TwoLayers(
        lambda mlp, x: mlp.fc2(quick_gelu(mlp.fc1(x).float()).to(mlp.fc2.weight.dtype))
    ),
    "a clamp": lambda: Written(lambda mlp, x: mlp.w3((F.silu(mlp.w1(x)) * mlp.w2(x)).clamp(-1, 1))),
    "a mean over tokens": lambda: TwoLayers(lambda mlp, x: mlp.fc2(F.gelu(mlp.fc1(x - x.mean(-2, keepdim=True))))),
    "a layer that is not used": lambda: Written(lambda mlp, x: mlp.w3(F.silu(mlp.w1(x)))),
    "a layer that is used twice": lambda: TwoLayers(lambda mlp, x: mlp.fc2(F.gelu(mlp.fc1(mlp.fc2(mlp.fc1(x)))))),
    "a norm that is not used": lambda: Written(packed_silu, packed=True, norm=nn.LayerNorm(H)),
    "more than tokens": lambda: TwoLayers(lambda mlp, x: mlp.fc2(x[0])),
}


@pytest.mark.parametrize("name", LOOK_LIKE_ONE)
def test_what_only_looks_like_an_mlp_is_refused(name: str) -> None:
    mlp = LOOK_LIKE_ONE[name]()
    children = ", ".join(f"{child}: {type(module).__name__}" for child, module in mlp.named_children())
    with pytest.raises(ConfigError, match="computes something else") as caught:
        form_of(mlp)
    assert f"{type(mlp).__name__} ({children})" in str(caught.value) and "layers" in str(caught.value)


def test_too_many_layers_and_quantized_ones_are_refused() -> None:
    many = nn.Sequential(*(nn.Linear(D, D) for _ in range(4)))
    with pytest.raises(ConfigError, match=r"Sequential has 4 \(0: Linear, .*3: Linear\)"):
        form_of(many)
    mlp = Written(packed_silu, packed=True)
    mlp.w3.weight = nn.Parameter(torch.zeros(D, H, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"Written\.w3 holds torch\.int8"):
        form_of(mlp)


@pytest.mark.parametrize("gate_last", [True, False])
def test_weights_are_not_needed_and_zeros_hide_nothing(gate_last: bool) -> None:
    forms = [{"fc1": ("up", "gate"), "fc2": ("down",)}, {"fc1": ("gate", "up"), "fc2": ("down",)}]
    fresh, blank = GluMlp(D, 2 * H, gate_last=gate_last), GluMlp(D + 1, 2 * H, gate_last=gate_last)
    with torch.device("meta"):
        meta = GluMlp(D, 2 * H + 2, gate_last=gate_last)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    for mlp in (fresh, blank, meta):
        assert form_of(mlp).roles == forms[0 if gate_last else 1]
        assert form_of(mlp).on_gate == ("act",)


def test_recognizing_leaves_the_mlp_and_the_random_numbers_as_they_were() -> None:
    mlp = GluMlp(D, 2 * H + 4, norm_layer=nn.BatchNorm1d, drop=0.25).eval()
    with pytest.raises(ConfigError):  # a norm over channels takes the second axis of tokens for them
        form_of(mlp)
    mlp.norm = nn.LayerNorm(H + 2).eval()
    state = {key: value.clone() for key, value in mlp.state_dict().items()}
    before = torch.get_rng_state()
    form_of(mlp)
    assert torch.equal(torch.get_rng_state(), before) and not mlp.training and not mlp.norm.training
    assert all(torch.equal(value, state[key]) for key, value in mlp.state_dict().items())
    assert not any(module._forward_hooks for module in mlp.modules())


@torch.no_grad()
def test_what_is_behind_the_last_layer_stays_in_every_form() -> None:
    mlp, x_BND = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.LayerNorm(D)), torch.randn(2, 5, D)
    mole = MoLEFeedForward(mlp, num_experts=1, rank=2, dropout=0.0)
    for experts in mole.experts():
        nn.init.normal_(experts.B_weight)
    folded = mole.folded(torch.ones(1))
    assert isinstance(folded, nn.Sequential) and not torch.allclose(mole(x_BND), mlp(x_BND), atol=0.1)
    torch.testing.assert_close(mole.for_inference()(x_BND), mole(x_BND), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded(x_BND), mole(x_BND), atol=1e-5, rtol=1e-5)


def gated_by(gate: str, up: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda mlp, x: mlp.w3(F.silu(getattr(mlp, gate)(x)) * getattr(mlp, up)(x))


def test_a_function_at_the_address_of_one_that_is_gone_is_recognized_itself() -> None:
    for gate, up in (("w1", "w2"), ("w2", "w1")) * 3:
        mlp = Written(gated_by(gate, up))
        assert form_of(mlp).roles == {gate: ("gate",), up: ("up",), "w3": ("down",)}
        del mlp
