"""How often a training step makes the host wait for the device, counted on a CPU.

On a GPU the host only queues work. It waits where a value must come back (``item``, ``tolist``, ``bool(tensor)``) and
where the shape of a result depends on values (``nonzero``, ``bincount``, indexing by a mask). Both are the same calls
on a CPU, so that they can be counted there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from visexpert.types import Batch

aten = torch.ops.aten

READS: frozenset[Any] = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default})
"""Operators that bring a value to the host."""

SHAPED: frozenset[Any] = frozenset(
    {
        aten.nonzero.default,
        aten.masked_select.default,
        aten.bincount.default,
        aten._unique2.default,
        aten._unique.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.unique_dim_consecutive.default,
    }
)
"""Operators whose result has a shape that depends on values."""

BY_MASK: frozenset[Any] = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)
"""Operators that look for the true values first where an index is a mask."""

COPIES = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__})
"""Methods that copy a tensor to the host without an operator of their own on a CPU."""

OF_THE_HOST = (str(Path("torch", "optim")),)
"""Whose reads are none of the device: torch's optimizers count their steps in tensors that stay on the host."""


@dataclass(frozen=True)
class Wait:
    """One wait.

    Args:
        what: The operator or method.
        where: File and line of the code that asked, the innermost outside torch.
    """

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


@dataclass
class Waits:
    """Counts while it is entered; may be entered several times.

    Args:
        host: Tensors that are on the host in training, too, so that reading them is free.
        found: What was counted so far.
    """

    host: Sequence[Tensor] = ()
    found: list[Wait] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    """Tensors that code made of Python's numbers, on the host until they are moved."""

    def __enter__(self) -> Waits:
        self._modes = (_Dispatched(self), _Called(self))
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def is_of_host(self, value: object) -> bool:
        """Whether a tensor would be on the host in training on a GPU."""
        return isinstance(value, Tensor) and any(value.data_ptr() == own.data_ptr() for own in (*self.host, *self.made))

    def note(self, what: object, read: Iterable[Any]) -> None:
        """Count a wait, unless it is the host's own.

        Args:
            what: What waits.
            read: What it reads.
        """
        where = _asked_by()
        if not any(part in where for part in OF_THE_HOST) and not any(map(self.is_of_host, read)):
            self.found.append(Wait(str(what), where))


def host_tensors(batch: Batch) -> list[Tensor]:
    """What of a batch stays on the host in training."""
    return [value for name in batch.of_host if isinstance(value := getattr(batch, name), Tensor)]


def waits_per_step(
    model: L.LightningModule,
    data: L.LightningDataModule | Iterable[Any],
    *,
    folder: Path,
    steps: int = 3,
    host: Callable[[Any], Sequence[Tensor]] = host_tensors,
) -> list[list[Wait]]:
    """Train some steps without logger, checkpoints and validation, and count in each, optimizer included.

    Args:
        model: What to train.
        data: Its data, or training batches.
        folder: Where Lightning may write.
        steps: How many steps.
        host: Tensors of a batch that stay on the host.
    """
    counter = _Counter(host)
    trainer = bare_trainer(folder, steps=steps, callbacks=[counter])
    if isinstance(data, L.LightningDataModule):
        trainer.fit(model, datamodule=data)
    else:
        loader: Any = DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(model, train_dataloaders=loader)
    return counter.steps


def bare_trainer(folder: Path, *, steps: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Make a trainer on the CPU without logger, checkpoints and validation; Lightning may write to ``folder``."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


class _Counter(L.Callback):
    """A count of its own for each step."""

    def __init__(self, host: Callable[[Any], Sequence[Tensor]]) -> None:
        self._host, self._now = host, Waits()
        self.steps: list[list[Wait]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._now = Waits(self._host(batch))
        self._now.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._now.__exit__(None, None, None)
        self.steps.append(self._now.found)


class _Dispatched(TorchDispatchMode):
    """Sees every operator, those of the backward pass included."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS or func in SHAPED:
            self._waits.note(func, args)
        elif func in BY_MASK and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._waits.note(f"{func} by a mask", ())
        elif func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None:
            self._waits.note(func, args)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Sees what becomes no operator on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in COPIES:
            self._waits.note(func.__name__, args[:1])
        result = func(*args, **named)
        if func in (torch.tensor, torch.as_tensor) and named.get("device") is None:
            self._waits.made.append(result)
        elif func is Tensor.to and self._waits.is_of_host(result):
            return result.clone()  # a copy on the device, which a CPU does not make
        return result


def _asked_by() -> str:
    """Innermost frame that is neither torch's own machinery nor of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside_torch = "torch" in path.parts and "optim" not in path.parts and "lightning" not in path.parts
        if path != Path(__file__) and not inside_torch:
            return f"{'/'.join(path.parts[-3:])}:{frame.lineno}"
    return "torch"
