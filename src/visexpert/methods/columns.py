"""Match the columns of a gate with those of a checkpoint by the names of their experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import ConfigError, WeightsError
from visexpert.names import CLIP, STUDENT
from visexpert.transfer import TokenGate

NAMES = "experts"
"""Key of a checkpoint for the names of its experts, in the order of the gate's columns."""


@dataclass(frozen=True)
class Columns:
    """Which expert each column of a gate belongs to.

    Args:
        names: Experts in the order of the columns.
        keys: Tensors of the state dict whose first axis runs over columns.
        fixed: Whether the gate is frozen, so that no column may start fresh.
    """

    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fixed: bool = False

    @classmethod
    def of(cls, names: Sequence[str], gate: TokenGate | None, *, fixed: bool = False) -> Columns:
        """Return the columns of a method's ``gate``, if it has one."""
        keys = () if gate is None else tuple(f"gate.{key}" for key in gate.column_keys())
        return cls(tuple(names), keys, fixed)

    def fresh(self, theirs: Sequence[str] | None) -> list[str]:
        """Return the experts that are not among ``theirs``, those of a checkpoint."""
        return [name for name in self.names if name not in (theirs or ())]

    def arrange(
        self, state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, theirs: Sequence[str] | None, path: object
    ) -> dict[str, Tensor]:
        """Return a checkpoint's state with its columns in the order of these experts; missing ones come from ``own``.

        Args:
            state: State of the checkpoint.
            own: State of the model.
            theirs: Experts of the checkpoint in the order of its columns; None if unknown.
            path: Path of the checkpoint, for messages.

        Raises:
            WeightsError: The checkpoint has columns, but does not name their experts.
            ConfigError: It has no column for an expert of a fixed gate.
        """
        arranged = dict(state)
        shared = [key for key in self.keys if key in state and state[key].shape[1:] == own[key].shape[1:]]
        if not shared or (theirs is None and len(state[shared[0]]) == len(self.names) == 1):
            return arranged
        if theirs is None or any(len(state[key]) != len(theirs) for key in shared):
            raise WeightsError(
                f"The gate in {path} has {len(state[shared[0]])} columns, but the file does not name their experts "
                f"(here {list(self.names)}); give the .ckpt that the run wrote."
            )
        if self.fixed and (unknown := self.fresh(theirs)):
            raise ConfigError(
                f"The gate in {path} weighs {list(theirs)}, not {unknown}, which are experts here; name only experts "
                "that it weighs (use), or train a gate with all of them."
            )
        for key in shared:
            given = dict(zip(theirs, state[key], strict=True))
            rows = [given.get(name, fresh.to(state[key])) for name, fresh in zip(self.names, own[key], strict=True)]
            arranged[key] = torch.stack(rows)
        return arranged


def experts_in(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the experts of a checkpoint in the order of its gate's columns; None if unknown.

    Checkpoints of earlier versions do not name them, but hold a part for each, in that order.
    """
    names = checkpoint.get(NAMES)
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(dict.fromkeys(_owners(checkpoint["state_dict"]))) or None


def refuse_other_order(columns: Columns, theirs: Sequence[str] | None, *, path: object) -> None:
    """Check that a resumed training has its experts in the same order: the optimizer's state has no names.

    Raises:
        WeightsError: The order differs.
    """
    if theirs is not None and sorted(theirs) == sorted(columns.names) and tuple(theirs) != columns.names:
        raise WeightsError(
            f"The checkpoint {path} was trained with the experts in the order {list(theirs)}, here they are "
            f"{list(columns.names)}; list them in its order to continue, or start from it by init_from instead of "
            "ckpt_path."
        )


def _owners(keys: Iterable[str]) -> Iterable[str]:
    """Yield the expert of each adapter (ToVE), head and watched variance (MoVE-KD)."""
    for key in keys:
        part, *rest = key.removeprefix("distillation.").split(".")
        if part == "adapters":
            yield rest[0]
        elif part == "heads" and rest[0] not in (CLIP, STUDENT):
            yield rest[0]
        elif part.startswith("variance_start_") and part.removeprefix("variance_start_") not in (CLIP, STUDENT):
            yield part.removeprefix("variance_start_")
