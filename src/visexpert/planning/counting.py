"""Operations and activations of one step by part, counted without computing anything."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from visexpert.planning.autocast import MixedPrecision
from visexpert.planning.meta import MetaMode, RealNumbers


@dataclass(frozen=True)
class StepCost:
    """Cost of one step.

    Args:
        forward: FLOP of the forward pass by part; a multiply-add counts as 2.
        backward: FLOP of the backward pass by part, including what gradient checkpointing recomputes.
        activation_bytes: Peak memory of the results of operations.
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    activation_bytes: int

    def total(self, part: str) -> int:
        """Return the FLOP of a part in both passes."""
        return self.forward.get(part, 0) + self.backward.get(part, 0)


def count_step(
    step: Callable[[], Any],
    model: nn.Module,
    parts: Mapping[str, Sequence[nn.Module]],
    *,
    float_bytes: int = 4,
    mixed: bool = False,
) -> StepCost:
    """Run a step on ``meta`` and count its operations and activations.

    torch's ``FlopCounterMode`` counts matrix products, convolutions and attention. Attention is counted as its
    products: causal attention in full, its backward pass without what fused kernels recompute (ways of counting differ
    there by half of attention's share).

    Args:
        step: Calls the model; if it returns a tensor with a graph, that is differentiated.
        model: The model, parameters on ``meta`` (see :func:`~visexpert.planning.meta.weightless`).
        parts: Modules by name of their part; one part may contain another.
        float_bytes: Bytes per floating-point activation.
        mixed: Whether autocast chooses between 2 and 4 bytes instead, operation by operation.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attribution, counter = Attribution(parts), FlopCounterMode(display=False)
    live = LiveTensors(float_bytes=None if mixed else float_bytes, weights=[*model.parameters(), *model.buffers()])
    casts = [MixedPrecision(trained, uncounted=live.paused)] if mixed else []
    spent: dict[bool, dict[str, int]] = {False: defaultdict(int), True: defaultdict(int)}
    before = [0]

    def start() -> None:
        before[0] = counter.get_total_flops()

    def note(result: Any) -> None:
        backward = attribution.is_backward
        if flop := counter.get_total_flops() - before[0]:
            spent[backward][attribution.now] += flop
        live.add(result, is_backward=backward)

    with ExitStack() as inside:
        for context in (_quiet(), _no_gradients_kept(trained), sdpa_kernel(SDPBackend.MATH), attribution.watching()):
            inside.enter_context(context)
        for function_mode in (RealNumbers(), live.scores, *casts):
            inside.enter_context(function_mode)
        for mode in (counter, MetaMode(before=start, after=note)):
            inside.enter_context(mode)
        result = step()
        if isinstance(result, Tensor) and result.requires_grad:
            result.sum().backward()
    return StepCost(dict(spent[False]), dict(spent[True]), live.peak)


@contextmanager
def _no_gradients_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Drop the gradients of weights, which are counted separately."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about values, which mean nothing on ``meta``."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


OTHER = "the rest"
"""Name under which operations outside all parts are counted, such as losses."""

_KEY, _KEPT = "visexpert_part", "visexpert_kept"


class Attribution:
    """Tells, inside :meth:`watching`, which part the current operation belongs to.

    In the forward pass it is the innermost part whose ``forward`` runs. In the backward pass it is the part that
    created the autograd node: when a part returns, it takes all nodes behind its outputs that have no owner yet.
    (torch's ``ModuleTracker`` fails where modules pass dataclasses to each other.)

    Args:
        parts: Modules by name of their part; one part may contain another.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        self._parts = parts
        self._running: list[str] = [OTHER]

    @property
    def now(self) -> str:
        """Name of the current part."""
        node = torch._C._current_autograd_node()
        return self._running[-1] if node is None else str(_notes(node).get(_KEY, OTHER))

    @property
    def is_backward(self) -> bool:
        """Whether the backward pass runs."""
        return torch._C._current_autograd_node() is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the forward calls of the parts."""
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
            if not self.is_backward:  # a checkpointed block that runs again belongs to the node that asks
                _own(_tensors((args, kwargs)), self._running[-1])
                self._running.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.is_backward:
            _own(_tensors(output), self._running.pop())


def _own(tensors: Iterable[Tensor], part: str) -> None:
    """Assign to a part all nodes behind the tensors that have no owner yet."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if _KEY in _notes(node):
            continue
        _notes(node)[_KEY] = part
        waiting += [behind for behind, _ in node.next_functions if behind is not None]


def _notes(node: Any) -> dict[str, Any]:
    """Return the metadata of an autograd node."""
    notes: dict[str, Any] = node.metadata
    return notes


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dataclasses, mappings and sequences."""
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


class LiveTensors:
    """Adds up the live results on ``meta`` and keeps their peak.

    Gradients of weights are left out, since they are counted separately, and so is what fused attention never stores.

    Args:
        float_bytes: Bytes per floating-point number; None for those of each tensor's dtype.
        weights: Parameters and buffers of the model; they must outlive this object.
    """

    def __init__(self, *, float_bytes: int | None, weights: Iterable[Tensor]) -> None:
        held = list(weights)
        self.peak = 0
        self.scores = AttentionShapes()
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._gradients = {tensor.numel() for tensor in held if tensor.requires_grad}
        self._float_bytes = float_bytes
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is made in this context."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add(self, result: Any, *, is_backward: bool) -> None:
        """Count the results of an operation."""
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta and not self._is_left_out(tensor, is_backward):
                self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._held:
            return
        if self._is_paused:
            self._held.add(key)
            return
        own = tensor.element_size()
        each = own if self._float_bytes is None or not tensor.is_floating_point() else self._float_bytes
        size = storage.nbytes() // own * each
        self._alive[key] = weakref.ref(storage, partial(self._forget, key, size))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._alive.pop(key, None)
        self._now -= size

    def _is_left_out(self, tensor: Tensor, is_backward: bool) -> bool:
        if self.scores.inside:
            return True
        if is_backward and tensor.ndim > 2 and tuple(tensor.shape[-2:]) in self.scores.seen:
            return True
        return is_backward and tensor.numel() in self._gradients


class AttentionShapes(TorchFunctionMode):
    """Records the logit shapes (queries, keys) of fused attention, and whether it is running.

    Its inputs and result stay until its backward pass, as fused attention keeps them: on ``meta`` it is computed in
    parts, which keep scaled copies of the inputs and the logits instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()
        self.inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | dict(kwargs or {})
        self.seen.add((named["query"].shape[-2], named["key"].shape[-2]))
        self.inside = True
        try:
            result: Tensor = func(*args, **(kwargs or {}))
            if result.ndim == 4:  # fused attention puts the heads of a token side by side
                result = result.transpose(1, 2).contiguous().transpose(1, 2)
        finally:
            self.inside = False
        if result.grad_fn is not None:
            notes = _notes(result.grad_fn)
            notes[_KEPT] = (*named.values(), result.detach())

            def release(*_: Any) -> None:
                notes.pop(_KEPT, None)

            result.grad_fn.register_hook(release)
        return result.view_as(result)  # an operation outside, which counts the result
