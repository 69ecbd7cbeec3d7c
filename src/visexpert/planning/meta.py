"""Models and steps on the ``meta`` device: parameters and pixels have no values; ids, masks and flags are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@contextmanager
def weightless() -> Iterator[None]:
    """Build modules with their parameters on ``meta``: shapes and dtypes without memory or initialization.

    Buffers stay real, since code reads their values (such as which experts are attached). Tied weights stay tied.
    """
    handle = register_module_parameter_registration_hook(_empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


aten = torch.ops.aten

Watcher = Callable[[Any], None]


class MetaMode(TorchDispatchMode):
    """Lets real and ``meta`` tensors mix: the result is on ``meta`` if any input is, and computed otherwise.

    So the step's own code branches on real values (which tokens are supervised, which experts are attached), and
    nothing that depends on weights or pixels is computed. Code that asks for the value of a ``meta`` tensor gets 1
    (true), and a ``meta`` mask selects everything. A real tensor keeps its values when a ``meta`` result is written
    into it.

    Args:
        before: Called before each operation.
        after: Called with the result of each operation.
    """

    def __init__(self, *, before: Callable[[], None], after: Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before, self._after = before, after

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        self._before()
        places = {leaf.is_meta for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)}
        if True in places:
            result = _on_meta(func, tuple(args), named, is_mixed=False in places)
        else:
            result = _real(func, tuple(args), named)
        self._after(result)
        return result


class RealNumbers(TorchFunctionMode):
    """Keeps tensors of Python integers and booleans real where code asks for them on ``meta``.

    ``torch.tensor`` drops the values before :class:`MetaMode` can see them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        target = named.get("device")
        if func not in (torch.tensor, torch.as_tensor) or target is None or torch.device(target).type != "meta":
            return func(*args, **named)
        made: Tensor = func(*args, **{**named, "device": "cpu"})
        return made.to("meta") if made.is_floating_point() else made


def _real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on real tensors; integers and booleans stay real even if asked for on ``meta``."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and result.is_meta and not result.is_floating_point():
        return func(*args, **{**kwargs, "device": torch.device("cpu")})
    return result


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_mixed: bool) -> Any:
    name = func._schema.name
    if name == "aten::_local_scalar_dense":
        return torch.ones((), dtype=args[0].dtype).item()
    target = kwargs.get("device")
    if name == "aten::_to_copy" and target is not None and torch.device(target).type != "meta":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=target)
    if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
        args, is_mixed = (args[0], _places(args[1]), *args[2:]), True
    writes_real = name.endswith("_") and isinstance(args[0], Tensor) and not args[0].is_meta
    on_meta, named = tree_map_only(Tensor, _to_meta, (args, kwargs)) if is_mixed else (args, kwargs)
    try:
        result = func(*on_meta, **named)
    except NotImplementedError:  # the shape of the result depends on values (bincount, nonzero)
        stand_ins, named = tree_map_only(Tensor, _stand_in, (args, kwargs))
        result = tree_map_only(Tensor, _to_meta, func(*stand_ins, **named))
    return args[0] if writes_real else result


def _places(indices: Sequence[Any]) -> list[Any]:
    """Turn masks into indices, so that their number is known; a mask on ``meta`` selects everything."""
    places: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        places += list(_stand_in(index).nonzero().unbind(1)) if is_mask else [index]
    return places


def _stand_in(tensor: Tensor) -> Tensor:
    """Return values for a tensor on ``meta``: true, 1.0, or the integer 0, which is a valid index."""
    if not tensor.is_meta:
        return tensor
    make = torch.ones if tensor.dtype == torch.bool or tensor.is_floating_point() else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")
