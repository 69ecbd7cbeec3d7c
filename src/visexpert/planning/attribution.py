"""Which part of a model an operation belongs to, in the forward and in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

OTHER = "the rest"
"""Where operations are counted that happen in no part, such as losses."""

_KEY = "visexpert_part"


class Attribution:
    """Says the part of the operation that runs now, between :meth:`watching`.

    In the forward pass it is the innermost part whose ``forward`` runs. In the backward pass it is the part that made
    the node of autograd's graph: when a part is left, all nodes behind its outputs that have no owner yet are its own.
    (torch's ``ModuleTracker`` cannot tell, where modules hand dataclasses to each other.)

    Args:
        parts: Modules of each part by its name; a part may lie inside another.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        self._parts = parts
        self._running: list[str] = [OTHER]

    @property
    def now(self) -> str:
        """Name of the part."""
        node = torch._C._current_autograd_node()
        return self._running[-1] if node is None else _notes(node).get(_KEY, OTHER)

    @property
    def is_backward(self) -> bool:
        """Whether the backward pass runs."""
        return torch._C._current_autograd_node() is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the parts' forward calls."""
        handles = []
        for name, modules in self._parts.items():
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.is_backward:  # a block that is run again for its activations belongs to the node that asks
                _own(_tensors((args, kwargs)), self._running[-1])
                self._running.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.is_backward:
            _own(_tensors(output), self._running.pop())


def _own(tensors: Iterable[Tensor], part: str) -> None:
    """Give a part all nodes behind some tensors that have no owner."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if _KEY in _notes(node):
            continue
        _notes(node)[_KEY] = part
        waiting += [behind for behind, _ in node.next_functions if behind is not None]


def _notes(node: Any) -> dict[str, str]:
    """What a node of autograd's graph carries for whoever asks."""
    notes: dict[str, str] = node.metadata
    return notes


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested records, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))
