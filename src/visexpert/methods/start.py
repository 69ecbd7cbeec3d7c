"""Start a run from an earlier run's weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from visexpert.errors import WeightsError
from visexpert.resources import load_checkpoint, load_safetensors, resolve_source

log = logging.getLogger(__name__)


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
    path = resolve_source(source)
    state = _read(path)
    own = module.state_dict()
    shared = {key: value for key, value in state.items() if key in own}
    reshaped = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in shared.items()
        if value.shape != own[key].shape
    ]
    expected = {key for key in own if key.split(".", 1)[0] not in ignore}
    missing, unexpected = sorted(expected - shared.keys()), sorted(state.keys() - own.keys())
    if complete and (missing or unexpected or reshaped):
        raise WeightsError(
            f"init_from: {path} is not of this model: missing {missing or 'none'}, unexpected {unexpected or 'none'}, "
            f"of another shape {reshaped or 'none'}; start from the stage that goes before, or allow what is missing "
            "or unexpected by init_complete=false."
        )
    if not shared:
        raise WeightsError(f"init_from: {path} shares no tensor with the model; give a run of the same parts.")
    if reshaped:
        raise WeightsError(
            f"init_from: {path} has tensors of other shapes, such as {reshaped[:3]}; give a run of the same sizes."
        )
    if lacking := [key for key in missing if key.split(".", 1)[0] in need]:
        raise WeightsError(f"init_from: {path} lacks {lacking}, which must come from there; give a run that has them.")
    module.load_state_dict(shared, strict=False)
    fresh = sorted({key.rsplit(".", 1)[0] for key in missing})
    log.info("Started from %s: %d tensors; left as they were: %s", path, len(shared), fresh[:8] or "none")
    return tuple(state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_safetensors(path, owner="init_from")
    state: dict[str, Tensor] = load_checkpoint(path, owner="init_from")["state_dict"]
    return state
