"""What the parts of a method hold: parameters that train, and parameters that do not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from visexpert.methods import Method, Part


@dataclass(frozen=True)
class Counts:
    """Parameters of a part.

    Args:
        trained: Those that an optimizer is to get.
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
    """What the optimizer gets, each once; after :func:`ready_to_train`."""
    modules = [module for group in method.trained_groups() for module in group.modules]
    found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def find_parts(method: Method) -> list[Part]:
    """The method's parts that have parameters."""
    return [part for part in method.parts() if any(True for module in part.modules for _ in module.parameters())]


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
