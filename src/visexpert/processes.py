"""What processes that train together share: sums over a step, and what the first of them does alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from visexpert.errors import UserError

Result = TypeVar("Result")

_TOGETHER: ContextVar[bool] = ContextVar("one_batch", default=False)


@contextmanager
def one_batch(*, together: bool) -> Iterator[None]:
    """Take the batches of all processes as one in this context: :func:`summed` adds up what each of them has.

    Args:
        together: Whether there are several processes; every one must then enter, and run the same code inside.
    """
    token = _TOGETHER.set(together)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def together() -> bool:
    """Return whether :func:`summed` adds up anything here."""
    return _TOGETHER.get()


def summed(values: Tensor) -> Tensor:
    """Return the sum over processes within :func:`one_batch`, with a gradient; elsewhere the values themselves.

    The gradient is a sum over processes, too: of a loss that each process computes from the sums and weights by its
    share, as :class:`~visexpert.methods.accumulation.StepShares` does.

    Args:
        values: Float, of the same shape and dtype on every process.
    """
    if not _TOGETHER.get():
        return values
    total: Tensor = _Sum.apply(values)
    return total


class _Sum(torch.autograd.Function):
    """The function of this name in torch.distributed.nn is deprecated, and what replaces it is private."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _reduced(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduced(gradients[0])


def _reduced(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def joined() -> bool:
    """Return whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Return whether this is the process that writes, of all in the group; True where there is only one."""
    return not joined() or dist.get_rank() == 0


def of_first(work: Callable[[], Result]) -> Result:
    """Let the first process do some work, such as to write, and return its result on all; every process must call this.

    Args:
        work: What it does; the result must pickle.

    Raises:
        UserError: The work raised one; every process raises it then.
    """
    if not joined():
        return work()
    done: list[Any] = [None, None]
    if is_first():
        try:
            done = [work(), None]
        except UserError as error:
            done = [None, error]
    dist.broadcast_object_list(done)
    found, refusal = done
    if refusal is not None:
        raise refusal
    result: Result = found
    return result
