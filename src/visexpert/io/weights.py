"""Read weights from outside without running code."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visexpert.errors import DataError, WeightsError, first_line
from visexpert.io.files import whole_file
from visexpert.io.reading import check_unpacked
from visexpert.io.source import WEIGHT_FILES, ZOO, ModelSource, zoo_names

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training scripts keep the weights, beside the optimizer's state and the like."""

T = TypeVar("T")


def cache_root(root: str | None = None) -> Path:
    """Return the folder for recomputable files: ``root``, else ``$VISEXPERT_CACHE``, else ``~/.cache/visexpert``."""
    return Path(root or os.environ.get("VISEXPERT_CACHE") or "~/.cache/visexpert").expanduser()


@dataclass(frozen=True)
class LoadedState:
    """Weights, and the file that they were read from, for messages.

    Args:
        path: File of the weights, or the index of a split one.
        tensors: Weights by name.
    """

    path: Path
    tensors: Mapping[str, Tensor]


def read_source(
    source: ModelSource,
    *,
    owner: str,
    names: Sequence[str] = WEIGHT_FILES,
    holding: re.Pattern[str] | None = None,
) -> LoadedState:
    """Read the weights of a source, all parts of a split file together.

    Args:
        source: Source of the weights.
        owner: Name of the caller, for messages.
        names: Names of the files to look for, best first.
        holding: For a split file: read only parts with a weight whose name matches; all if none does.

    Raises:
        WeightsError: They are missing or damaged, or an index lists a file outside its folder.
    """
    path = source.file or source.fetch(*names, owner=owner)
    if path.suffix != ".json":
        return LoadedState(path, load_state(path, owner=owner))
    tensors: dict[str, Tensor] = {}
    for part in source.parts(path, owner=owner, holding=holding):
        tensors |= load_state(source.fetch(part, owner=owner), owner=owner)
    return LoadedState(path, tensors)


def load_safetensors(path: Path, *, owner: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.
        owner: Name of the caller, for the message.

    Raises:
        WeightsError: The file is missing or is not valid safetensors.
    """
    if not path.is_file():
        hint = f"shipped entries are {zoo_names()}" if path.parent == ZOO else "check the path, or train it first"
        raise WeightsError(f"{owner}: no weights at {path}; {hint}.")
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can make the reader raise anything
        raise WeightsError(f"{owner}: {path} is not a readable safetensors file ({error}); fetch it again.") from error


def write_weights(state: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, that every user may read (safetensors makes it private).

    Args:
        state: Weights by name; none shares its memory with another.
        path: The file.
        metadata: Further texts of its header.

    Raises:
        DataError: The disk is full or the folder cannot be written.
    """
    try:
        with whole_file(path) as part:
            save_file(
                {key: value.contiguous() for key, value in state.items()}, part, {"format": "pt", **(metadata or {})}
            )
            part.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"Cannot write {path} ({first_line(error)}): free disk space, or use another folder."
        ) from error


def load_state(path: Path, *, owner: str) -> dict[str, Tensor]:
    """Read the weights of a published model from safetensors, or from a torch file without running its code.

    A training checkpoint (:data:`WRAPPERS`) is unwrapped, and what DistributedDataParallel and ``torch.compile`` add
    to its keys is removed.

    Args:
        path: File ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin``.
        owner: Name of the caller, for the message.

    Raises:
        WeightsError: The file is missing, damaged, could run code, or is not a state dict.
    """
    if path.suffix == ".safetensors":
        return _unprefixed(load_safetensors(path, owner=owner))
    if not path.is_file():
        raise WeightsError(f"{owner}: no weights at {path}; check the path, or fetch them first.")
    try:
        check_unpacked(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        raise unreadable(path, error, owner=owner) from error
    state = _unwrapped(loaded)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"{owner}: {path} is not a state dict (tensors by name); use a file with one.")
    return _unprefixed(state)


def unreadable(what: Path | str, error: Exception, *, owner: str) -> WeightsError:
    """Return the error for weights that cannot be read: a pickle that could run code, or a damaged file.

    Args:
        what: The file, or a description of it.
        error: Error of the reader; torch's text is not passed on, for it advises loading the file unsafely.
        owner: Name of the caller, for the message.
    """
    text = " ".join(str(error).split())
    if "weights_only" not in text and "Weights only" not in text:
        return WeightsError(f"{owner}: {what} cannot be read ({text[:300]}); fetch it again.")
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named is None:
        return WeightsError(
            f"{owner}: {what} cannot be read: it is damaged, or has more than tensors in it; fetch it again."
        )
    return WeightsError(
        f"{owner}: {what} cannot be read: its pickle names {named[1]}, which could run code; if you trust the file, "
        "convert it to safetensors (safetensors.torch.save_file of its state dict)."
    )


def reshaped(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> list[str]:
    """Return up to three weights that differ in shape, with both shapes, from transformers' report on loading.

    Args:
        mismatched: ``mismatched_keys`` of the report: name, shape in the file, and shape in the network.
    """
    return [f"{name} {tuple(found)} instead of {tuple(needed)}" for name, found, needed in sorted(mismatched)][:3]


def state_keys(path: Path) -> list[str] | None:
    """Return the names of the weights that :func:`load_state` would return, without reading them; None if it fails."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                return list(_unprefixed(dict.fromkeys(opened.keys())))
        check_unpacked(path)
        state = _unwrapped(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # load_state reports what is wrong
        return None
    return list(_unprefixed(state)) if isinstance(state, dict) else None


def _unwrapped(loaded: Any) -> Any:
    """Return the state dict in what a training script saved; None if there is none."""
    if not isinstance(loaded, dict):
        return None
    return next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)


def _unprefixed(state: dict[str, T]) -> dict[str, T]:
    plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    wrapped = bool(plain) and all(key.startswith("module.") for key in plain)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in plain.items()}


def fill_module(module: nn.Module, state: dict[str, Tensor], *, owner: str, path: Path) -> None:
    """Load ``state`` strictly into ``module``, cast to its dtypes.

    Raises:
        WeightsError: A key is missing, unexpected or of another shape (the message names up to three of each), or a
            weight is NaN or infinite.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    shared = expected.keys() & state.keys()
    reshaped = sorted(
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in shared
        if state[key].shape != expected[key].shape
    )
    if missing or unexpected or reshaped:
        raise WeightsError(
            f"{owner}: the weights in {path} do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {reshaped[:3]}; use the file that belongs to this configuration."
        )
    spoilt = sorted(key for key, _ in module.named_parameters() if not bool(state[key].isfinite().all()))
    if spoilt:
        raise WeightsError(
            f"{owner}: {len(spoilt)} of the weights in {path} are NaN or infinite ({spoilt[:3]}); use a file from "
            "before the training diverged, or fetch it again."
        )
    module.load_state_dict(
        {key: value.to(expected[key].dtype) for key, value in state.items()}, strict=True, assign=False
    )


def weights_digest(module: nn.Module, *, facts: str) -> str:
    """Return a hash of all weights and of ``facts``, which identifies what a frozen encoder computes.

    Args:
        module: Network, with its weights loaded.
        facts: What else its output depends on: input size, layer, normalization.
    """
    digest = hashlib.sha256(facts.encode())
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
