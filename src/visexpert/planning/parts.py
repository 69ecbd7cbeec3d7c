"""The parts of a method that a plan lists: encoder, MoLE, experts, what connects them, language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from visexpert.experts import ExpertHub
from visexpert.language import LanguageSide
from visexpert.methods import Method
from visexpert.vision import ClipEncoder

Role = Literal["student", "teachers", "transfer", "language"]

ROLES: tuple[Role, ...] = ("student", "teachers", "transfer", "language")
"""What a part is for: CLIP with MoLE; frozen experts and the frozen copy of CLIP; adapters, heads, gate, projector."""

_NAMES = {"distillation": "KD heads", "adapters": "expert adapters"}


@dataclass(frozen=True)
class Part:
    """A part of a method.

    Args:
        name: Shown in the plan.
        role: What it is for.
        modules: Where it begins; those of a part inside another come first in the list of parts.
    """

    name: str
    role: Role
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Counts:
    """Parameters of a part.

    Args:
        trained: Those that an optimiser is to get.
        frozen: The others.
    """

    trained: int
    frozen: int


def ready_to_train(method: Method) -> None:
    """Freeze and thaw as a fit does, without reading weights."""
    method.mark_loaded()
    method.init_from = None
    method.setup("fit")
    method.train()


def trained_parameters(method: Method) -> list[nn.Parameter]:
    """What the optimiser gets, each once; after :func:`ready_to_train`."""
    modules = [module for group in method.trained_groups() for module in group.modules]
    found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def find_parts(method: Method) -> list[Part]:
    """The parts, MoLE before the CLIP that it lies in; whatever has no parameters is left out."""
    parts = [part for name, child in method.named_children() for part in _parts_of(name, child)]
    return [part for part in parts if any(True for module in part.modules for _ in module.parameters())]


def _parts_of(name: str, module: nn.Module) -> Iterator[Part]:
    if isinstance(module, ExpertHub):
        yield from (Part(f"expert {expert}", "teachers", (module[expert],)) for expert in module.names)
    elif isinstance(module, ClipEncoder):
        is_teacher = name == "anchor"
        added = [child for layer in module.mole_layers() for child in layer.added_modules()]  # type: ignore[operator]
        yield Part("MoLE", "student", tuple(added))
        yield Part("frozen CLIP" if is_teacher else "CLIP", "teachers" if is_teacher else "student", (module,))
    elif isinstance(module, LanguageSide):
        yield Part("language model", "language", (module,))
    else:
        is_container = isinstance(module, nn.ModuleDict | nn.ModuleList)  # which is never called itself
        yield Part(_NAMES.get(name, name), "transfer", tuple(module.children()) if is_container else (module,))


def parameter_counts(parts: list[Part], trained: list[nn.Parameter]) -> dict[str, Counts]:
    """Parameters by part, each in the first part that has it."""
    learning, seen = {id(parameter) for parameter in trained}, set[int]()
    counts: dict[str, Counts] = {}
    for part in parts:
        sums = {True: 0, False: 0}
        for parameter in (parameter for module in part.modules for parameter in module.parameters()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                sums[id(parameter) in learning] += parameter.numel()
        counts[part.name] = Counts(trained=sums[True], frozen=sums[False])
    return counts
