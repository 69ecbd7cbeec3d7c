"""How much memory the results of operations take at a time, were they computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class LiveTensors:
    """Adds up the results on ``meta`` that are alive, and remembers the most there were at once.

    Weights' gradients are left out (they are counted by themselves), and so are the logits of attention, which fused
    attention never holds.

    Args:
        float_bytes: Bytes of a floating-point number.
        weights: What the model itself holds; outlives this object.
    """

    def __init__(self, *, float_bytes: int, weights: Iterable[Tensor]) -> None:
        held = list(weights)
        self.peak = 0
        self.scores = AttentionShapes()
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._gradients = {tensor.numel() for tensor in held if tensor.requires_grad}
        self._float_bytes = float_bytes

    def add(self, result: Any, *, is_backward: bool) -> None:
        """Take the results of an operation into account."""
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta and not self._is_left_out(tensor, is_backward):
                self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._held:
            return
        numbers = storage.nbytes() // tensor.element_size()
        size = numbers * (self._float_bytes if tensor.is_floating_point() else tensor.element_size())
        self._alive[key] = weakref.ref(storage, partial(self._forget, key, size))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._alive.pop(key, None)
        self._now -= size

    def _is_left_out(self, tensor: Tensor, is_backward: bool) -> bool:
        if (is_backward or self.scores.inside) and tensor.ndim > 2 and tuple(tensor.shape[-2:]) in self.scores.seen:
            return True
        return is_backward and tensor.numel() in self._gradients


class AttentionShapes(TorchFunctionMode):
    """Notes the shapes (queries, keys) of the logits of fused attention, and whether it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()
        self.inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key"), args, strict=False)) | dict(kwargs or {})
        self.seen.add((named["query"].shape[-2], named["key"].shape[-2]))
        self.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False
