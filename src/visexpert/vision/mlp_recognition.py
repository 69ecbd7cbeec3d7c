"""Find the MLPs of a vision transformer of any library, and recognize their form by running them."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.vision.mole_forward import FUNCTIONS, MLPForm, parts_of, through

_KNOWN: dict[tuple[type, str, str], tuple[MLPForm, dict[str, Any]]] = {}
"""Forms by class, children and attributes of an MLP, with those attributes: an encoder's blocks are recognized once."""


def form_of(mlp: nn.Module) -> MLPForm:
    """Return the form of an MLP: the one that gives what the MLP's own forward gives, to the bit.

    A copy with random weights is run on random tokens, in float32 and bfloat16, in evaluation and in training, and each
    form that its children allow is held against it. The MLP itself may be on the meta device.

    Raises:
        ConfigError: No form fits, or the linear layers are quantized.
    """
    kind = type(mlp).__name__
    linears = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]
    way_out = "leave its block out with layers, or take a model with such MLPs."
    wanted = "MoLE goes beside an MLP of two linear layers in sequence or a gated one (SwiGLU) of two or three"
    if len(linears) not in (2, 3):
        raise ConfigError(f"{wanted}, and {kind} has {len(linears)} ({_children(mlp)}); {way_out}")
    for name in linears:
        weight = mlp.get_submodule(name).get_parameter("weight")
        if not weight.is_floating_point():
            raise ConfigError(
                f"MoLE trains beside floating-point layers, and {kind}.{name} holds {weight.dtype}; load the model "
                "without quantization."
            )
    own = _own(mlp)
    signature = type(mlp), repr(mlp), repr(own)
    if signature not in _KNOWN:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            form = _recognized(mlp)
        if form is None:
            raise ConfigError(f"{wanted}, and {kind} ({_children(mlp)}) computes something else; {way_out}")
        _KNOWN[signature] = form, own  # kept, since another function may get the address of one that is gone
    return _KNOWN[signature][0]


def _own(mlp: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module, those that every module has left out."""
    common = vars(nn.Module()).keys()
    return {name: value for name, value in vars(mlp).items() if name not in common}


def _recognized(mlp: nn.Module) -> MLPForm | None:
    if any(True for _ in mlp.parameters(recurse=False)) or any(True for _ in mlp.buffers(recurse=False)):
        return None  # no child holds them, so no form has a place for them
    trial = _random_copy(mlp)
    called = _calls(trial)
    if called is None:
        return None
    calls, x_BND = called
    if not _goes_token_by_token(trial, x_BND):
        return None
    form = next((form for form in _forms(trial, calls) if _equals(trial, form, x_BND)), None)
    # A library that computes in float32 what it is given in bfloat16 differs there alone.
    return form if form is not None and _equals(trial.bfloat16(), form, x_BND.bfloat16()) else None


def _equals(trial: nn.Module, form: MLPForm, x_BND: Tensor) -> bool:
    """Check that an MLP and its children in a form's order agree to the bit, in evaluation and in training."""
    for training in (False, True):
        trial.train(training)
        if not _same(_seeded(_Run(trial, form), x_BND), _seeded(trial, x_BND)):
            return False
    return True


def _random_copy(mlp: nn.Module) -> nn.Module:
    """Return a copy in float32 on the CPU whose every parameter counts, unlike zeros and ones of a fresh model."""
    is_meta = any(parameter.is_meta for parameter in mlp.parameters())
    trial = copy.deepcopy(mlp)
    trial = (trial.to_empty(device="cpu") if is_meta else trial.cpu()).float()
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in trial.parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.normal_(std=std, generator=generator)
    for buffer in trial.buffers() if is_meta else ():
        buffer.fill_(1)
    return trial


def _calls(trial: nn.Module) -> tuple[list[str], Tensor] | None:
    """Return the names of the children in the order of their calls, and the tokens that the MLP takes."""
    calls: list[str] = []
    hooks = [
        child.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
        for name, child in trial.named_children()
    ]
    widths = dict.fromkeys(child.in_features for child in trial.children() if isinstance(child, nn.Linear))
    try:
        for width in widths:
            calls.clear()
            x_BND = torch.randn(2, 3, width, generator=torch.Generator("cpu").manual_seed(1))
            if isinstance(_seeded(trial.eval(), x_BND), Tensor):
                return calls, x_BND
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _seeded(module: nn.Module, x_BND: Tensor) -> object:
    """Return what a module makes of tokens with the same random numbers each time; None where it takes no tokens."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
    try:
        return module(x_BND)
    except Exception:  # whatever an unknown forward may raise: it takes more than tokens, or none of this width
        return None


def _same(ours: object, theirs: object) -> bool:
    return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)


def _goes_token_by_token(mlp: nn.Module, x_BND: Tensor) -> bool:
    together, alone = mlp(x_BND), _seeded(mlp, x_BND[1, 2:])
    if not isinstance(alone, Tensor) or together.shape != x_BND.shape or alone.shape != x_BND[1, 2:].shape:
        return False
    return torch.allclose(together[1, 2:], alone, rtol=1e-3, atol=1e-4)


class _Run(nn.Module):
    """The children of an MLP, run as a form says; linear layers by weight and bias alone, which merged ones keep."""

    def __init__(self, mlp: nn.Module, form: MLPForm) -> None:
        super().__init__()
        self.mlp, self.form = mlp, form

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        return through(self.form, x_BND, child=self.mlp.get_submodule, linear=self._linear)

    def _linear(self, name: str, x: Tensor) -> Sequence[Tensor]:
        layer = self.mlp.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return parts_of(F.linear(x, layer.weight, layer.bias), self.form.roles[name])


def _forms(mlp: nn.Module, calls: Sequence[str]) -> Iterator[MLPForm]:
    """Yield the forms that the calls of the children allow, those with the shortest gate first."""
    linears = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    order = [name for name in calls if name in linears]
    if sorted(order) != sorted(linears):
        return  # a linear layer is left out, or called twice
    *inner, outer = order
    end = calls.index(outer)
    others, after = tuple(name for name in calls[:end] if name not in linears), tuple(calls[end + 1 :])
    if any(name not in calls for name, child in mlp.named_children() if list(child.parameters())):
        return  # weights that the forward does not use
    doubled = linears[inner[0]].out_features == 2 * linears[outer].in_features
    if len(inner) == 1 and not doubled:
        for activation in (None, *FUNCTIONS):
            yield MLPForm({inner[0]: ("fc1",), outer: ("fc2",)}, activation, between=others, after=after)
        return
    for first, second in permutations(("gate", "up")):
        roles = {inner[0]: (first,), inner[1]: (second,)} if len(inner) == 2 else {inner[0]: (first, second)}
        for length in (*range(1, len(others) + 1), 0):
            for activation in (None, *FUNCTIONS):
                yield MLPForm(
                    {**roles, outer: ("down",)},  # type: ignore[dict-item]
                    activation,
                    on_gate=others[:length],
                    between=others[length:],
                    after=after,
                )


def find_mlps(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the MLPs of a transformer's blocks by their dotted names, in the order of the blocks.

    An MLP is a module in a numbered block that holds two linear layers or more itself and is called an MLP or a
    feed-forward, by its attribute or its class. Whether MoLE can go beside it, :func:`form_of` says.

    Raises:
        ConfigError: There is none, or there are several towers of them.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in encoder.named_modules():
        if re.search(r"\d", name) and _is_mlp(name, module):
            found.setdefault(re.sub(r"\b\d+\b", "*", name), {})[name] = module
    who = type(encoder).__name__
    if not found:
        kinds = Counter(type(module).__name__ for module in encoder.modules() if not list(module.children()))
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "nothing"
        raise ConfigError(
            f"add_mole: {who} has no MLPs in numbered blocks (its layers are {there}); give a vision transformer of "
            "transformers or timm."
        )
    if len(found) > 1:
        raise ConfigError(
            f"add_mole: {who} has MLPs in several places ({', '.join(found)}); give the part to equip, such as "
            "model.vision_model."
        )
    return next(iter(found.values()))


def _is_mlp(name: str, module: nn.Module) -> bool:
    linears = sum(isinstance(child, nn.Linear) for child in module.children())
    words = (name.rsplit(".", 1)[-1] + " " + type(module).__name__).lower()
    return hasattr(module, "added_modules") or (
        linears >= 2 and any(word in words for word in ("mlp", "ffn", "feed", "swiglu", "glu"))
    )


def _children(module: nn.Module) -> str:
    return ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children())
