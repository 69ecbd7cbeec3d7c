"""Find the MLPs of a vision transformer of any library, and how a token goes through one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP

from visexpert.errors import ConfigError


@dataclass(frozen=True)
class MLPOrder:
    """Order of the children of an MLP of two linear layers: first, between, second, after.

    Args:
        first: Name of the linear layer that widens.
        between: Names of what runs between the two: activation, dropout, norm.
        second: Name of the linear layer that narrows.
        after: Names of what runs behind it.
    """

    first: str
    between: tuple[str, ...]
    second: str
    after: tuple[str, ...] = ()


_CLIP = MLPOrder("fc1", ("activation_fn",), "fc2")


def order_of(mlp: nn.Module) -> MLPOrder:
    """Return the order of an MLP's children, as its own forward calls them on random tokens.

    Raises:
        ConfigError: It is not two linear layers in sequence: a gated MLP (SwiGLU), quantized layers, or something else.
    """
    if type(mlp) is CLIPMLP:
        return _CLIP
    kind = type(mlp).__name__
    linears = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]
    if len(linears) != 2:
        raise ConfigError(
            f"MoLE goes beside an MLP of two linear layers, and {kind} has {len(linears)} ({_children(mlp)}); leave "
            "its block out with layers, or take a model with plain MLPs."
        )
    weight = mlp.get_submodule(linears[0]).get_parameter("weight")
    if not weight.is_floating_point():
        raise ConfigError(
            f"MoLE trains beside floating-point layers, and {kind}.{linears[0]} holds {weight.dtype}; load the model "
            "without quantization."
        )
    order = _called(mlp, weight)
    if order is None:
        raise ConfigError(
            f"MoLE goes beside an MLP of two linear layers in sequence, and {kind} ({_children(mlp)}) computes "
            "something else, such as a gate; leave its block out with layers, or take a model with plain MLPs."
        )
    return order


def in_order(mlp: nn.Module, order: MLPOrder, x: Tensor) -> Tensor:
    """Return what the children give, one after the other."""
    for name in (order.first, *order.between, order.second, *order.after):
        x = mlp.get_submodule(name)(x)
    return x


@torch.no_grad()
def _called(mlp: nn.Module, weight: Tensor) -> MLPOrder | None:
    """Return the order in which the forward calls the children; None where it does more than that."""
    calls: list[str] = []
    hooks = [
        child.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
        for name, child in mlp.named_children()
    ]
    modes = {module: module.training for module in mlp.modules()}
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(3, weight.shape[1], generator=generator).to(weight)
    try:
        mlp.eval()
        out = mlp(x_ND)
        linears = [index for index, name in enumerate(calls) if isinstance(mlp.get_submodule(name), nn.Linear)]
        if len(linears) != 2 or linears[0] != 0:
            return None
        middle = linears[1]
        order = MLPOrder(calls[0], tuple(calls[1:middle]), calls[middle], tuple(calls[middle + 1 :]))
        again = in_order(mlp, order, x_ND)
    except (RuntimeError, TypeError, AttributeError):  # it takes more than tokens, or no tokens of this width
        return None
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    same = isinstance(out, Tensor) and out.shape == again.shape and (out.is_meta or torch.equal(out, again))
    return order if same else None


def find_mlps(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the MLPs of a transformer's blocks by their dotted names, in the order of the blocks.

    An MLP is a module in a numbered block that holds two linear layers or more itself and is called an MLP or a
    feed-forward, by its attribute or its class. Whether it is a plain one, :func:`order_of` says.

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
