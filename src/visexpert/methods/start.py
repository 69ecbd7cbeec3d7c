"""Start a run from an earlier run's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from visexpert.errors import WeightsError
from visexpert.io.checkpoints import LAST, is_checkpoint, load_checkpoint, newest_checkpoint
from visexpert.io.source import local_path
from visexpert.io.weights import load_safetensors
from visexpert.methods.columns import Columns, experts_in

log = logging.getLogger(__name__)


@runtime_checkable
class Keeper(Protocol):
    """A module whose checkpoints leave out frozen parts except those to keep."""

    def keep(self, keys: Iterable[str]) -> None:
        """Keep these tensors."""

    def columns(self) -> Columns:
        """Return which expert each column of a gate belongs to."""


def find_start(source: str) -> Path:
    """Return the file or folder to start from; ``last.ckpt`` stands for the run's newest complete checkpoint.

    Raises:
        WeightsError: It does not exist, or cannot be read.
    """
    path = local_path(source)
    if path.name == LAST:
        path = newest_checkpoint(path.parent) or path
    if not is_checkpoint(path):
        raise WeightsError(
            f"init_from: there is no checkpoint {path}; let the run that it belongs to finish first, such as stage 1 "
            "before stage 2, or give the path of another run's .ckpt file."
        )
    return path


def start_from(
    module: nn.Module, source: str, *, complete: bool = False, ignore: Sequence[str] = (), need: Sequence[str] = ()
) -> None:
    """Copy the tensors that a checkpoint shares with ``module``; log what starts fresh.

    Columns of a gate are matched by the names of their experts: experts that the checkpoint lacks start fresh, experts
    that only it has are left out.

    Args:
        module: The method, already built.
        source: A Lightning checkpoint (read with ``weights_only=True``) or a safetensors file.
        complete: Refuse a checkpoint with missing or unexpected parts.
        ignore: Parts, by attribute name, that checkpoints leave out.
        need: Parts, by attribute name, that must not start fresh, even if not ``complete``.

    Raises:
        WeightsError: The file is missing, may run code, shares no tensor, shares one of another shape, lacks a needed
            one, or has a gate whose experts are unknown; with ``complete``, any missing or unexpected key, each named.
    """
    path = find_start(source)
    state, theirs = _read(path)
    own = module.state_dict()
    columns = module.columns() if isinstance(module, Keeper) else Columns()
    state = columns.arrange(state, own, theirs=theirs, path=path)
    shared = {key: value for key, value in state.items() if key in own}
    expected = {key: value for key, value in own.items() if key in shared or key.split(".", 1)[0] not in ignore}
    found = KeyDifferences.between(expected, state)
    if complete and found:
        raise WeightsError(
            f"init_from: {path} is not of this model: missing {found.missing or 'none'}, unexpected "
            f"{found.unexpected or 'none'}, of another shape {found.reshaped or 'none'}; start from the stage "
            "before this one, or allow what is missing or unexpected by init_complete=false."
        )
    if not shared:
        raise WeightsError(f"init_from: {path} shares no tensor with the model; give a run of the same parts.")
    if found.reshaped:
        raise WeightsError(
            f"init_from: {path} has tensors of other shapes, such as {found.reshaped[:3]}; give a run of the same "
            "sizes."
        )
    if lacking := [key for key in found.missing if key.split(".", 1)[0] in need]:
        raise WeightsError(f"init_from: {path} lacks {lacking}, which must come from there; give a run that has them.")
    module.load_state_dict(shared, strict=False)
    if isinstance(module, Keeper):
        module.keep(shared)
    fresh = sorted({key.rsplit(".", 1)[0] for key in found.missing})
    log.info("Started from %s: %d tensors; left as they were: %s", path, len(shared), fresh[:8] or "none")
    if new := columns.fresh(theirs):
        log.info("Experts that start fresh, since %s has none of these names: %s", path, new)
    if left := [name for name in theirs or () if name not in columns.names]:
        log.info("Experts of %s that are left out: %s", path, left)


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return the state of a checkpoint, and its experts in the order of the columns if known."""
    if path.suffix == ".safetensors":
        return load_safetensors(path, owner="init_from"), None  # sorted by name, so the order of the experts is lost
    checkpoint = load_checkpoint(path, owner="init_from")
    return checkpoint["state_dict"], experts_in(checkpoint)


@dataclass(frozen=True)
class KeyDifferences:
    """Differences between a checkpoint's keys and a model's.

    Args:
        missing: Keys that only the model has, sorted.
        unexpected: Keys that only the checkpoint has, sorted.
        reshaped: ``KEY (shape there) instead of (shape here)``.
    """

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @classmethod
    def between(cls, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> KeyDifferences:
        """Compare a model's ``own`` state with a checkpoint's."""
        reshaped = [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ]
        return cls(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()), reshaped)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)


def refuse_other_model(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, path: object) -> None:
    """Check that weights fit this model.

    Raises:
        WeightsError: A key is missing, unexpected or of another shape; up to three of each are named.
    """
    if found := KeyDifferences.between(own, state):
        raise WeightsError(
            f"The checkpoint {path} is of another model: missing {_some(found.missing)}, unexpected "
            f"{_some(found.unexpected)}, of another shape {_some(found.reshaped)}; give one that this configuration "
            "trained, or take what fits from it by init_from instead of ckpt_path."
        )


def refuse_other_training(groups: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any], *, path: object) -> None:
    """Check that the same parts train as in the training to resume, which may be of another stage.

    Args:
        groups: The optimizer's groups, from :func:`~visexpert.optim.make_groups`.
        checkpoint: The checkpoint, with the optimizer's state if it has one.
        path: Its path, for the message.

    Raises:
        WeightsError: The groups differ in name or in number of parameters.
    """
    for state in checkpoint.get("optimizer_states", ())[:1]:
        trained = {str(group.get("name")): len(group["params"]) for group in state["param_groups"]}
        wanted = {str(group.get("name")): len(group["params"]) for group in groups}
        if trained != wanted:
            raise WeightsError(
                f"The checkpoint {path} comes from another training: that one trained {_counts(trained)}, this one "
                f"would train {_counts(wanted)}; continue with that run's own configuration, or start from it by "
                "init_from instead of ckpt_path."
            )


def _some(items: Sequence[str]) -> str:
    return f"{list(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}" if items else "none"


def _counts(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in groups.items())
