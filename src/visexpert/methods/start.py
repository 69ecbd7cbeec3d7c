"""Start a run from an earlier run's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from visexpert.errors import WeightsError
from visexpert.methods.matching import KeyDifferences
from visexpert.resources import load_checkpoint, load_safetensors, resolve_source

log = logging.getLogger(__name__)


@runtime_checkable
class Keeper(Protocol):
    """A module whose checkpoints leave frozen parts out, unless it is told to keep them."""

    def keep(self, keys: Iterable[str]) -> None:
        """Keep these tensors."""


def find_start(source: str) -> Path:
    """The file that a run is to start from.

    Raises:
        WeightsError: It is not there.
    """
    path = resolve_source(source)
    if not path.is_file():
        raise WeightsError(
            f"init_from: there is no checkpoint {path}; let the run that it belongs to finish first, such as stage 1 "
            "before stage 2, or give the path of another run's .ckpt file."
        )
    return path


def start_from(
    module: nn.Module, source: str, *, complete: bool = False, ignore: Sequence[str] = (), need: Sequence[str] = ()
) -> tuple[str, ...]:
    """Copy every tensor that a checkpoint shares with ``module``; say what stays fresh.

    Args:
        module: The method, already built.
        source: A Lightning checkpoint (read with ``weights_only=True``) or a safetensors file.
        complete: Refuse a checkpoint that lacks a part of the module or has parts of another one.
        ignore: Parts, by first name, that checkpoints leave out.
        need: Parts, by first name, that must not stay fresh, ``complete`` or not.

    Returns:
        The checkpoint's keys, in its order.

    Raises:
        WeightsError: The file is missing, may run code, shares no tensor, shares one of another shape, or lacks a
            needed one; with ``complete``, also any missing or unexpected key, each named.
    """
    path = find_start(source)
    state = _read(path)
    own = module.state_dict()
    shared = {key: value for key, value in state.items() if key in own}
    expected = {key: value for key, value in own.items() if key in shared or key.split(".", 1)[0] not in ignore}
    found = KeyDifferences.between(expected, state)
    if complete and found:
        raise WeightsError(
            f"init_from: {path} is not of this model: missing {found.missing or 'none'}, unexpected "
            f"{found.unexpected or 'none'}, of another shape {found.reshaped or 'none'}; start from the stage that "
            "goes before, or allow what is missing or unexpected by init_complete=false."
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
    return tuple(state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_safetensors(path, owner="init_from")
    state: dict[str, Tensor] = load_checkpoint(path, owner="init_from")["state_dict"]
    return state
