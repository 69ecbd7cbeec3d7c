"""Sharded checkpoints: folders that FSDP and DeepSpeed write when each process saves its own shard.

The engine's own reader assembles them, but left to itself it would run code from the folder. Here none is run: the
index of ``torch.distributed.checkpoint`` is decoded by an unpickler that only knows its classes, and DeepSpeed's tool
reads under torch's own switch for weights only.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from inspect import signature
from io import StringIO
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from visexpert.io.reading import check_unpacked

INDEX, FACTS = ".metadata", "meta.pt"
"""Files of a folder that FSDP wrote through Lightning: the places of the shards, and everything but the weights."""

LATEST = "latest"
"""File of a folder that DeepSpeed wrote: the name of the subfolder with the shards."""

_ROOTS = ("model", "state_dict")
"""Keys of the weights in FSDP's folders, by version."""

_OF_THE_ENGINE = frozenset(
    "module optimizer lr_scheduler csr_tensor_module_names sparse_tensor_module_names skipped_steps global_steps "
    "global_samples dp_world_size mp_world_size buffer_names param_shapes frozen_param_shapes frozen_param_fragments "
    "shared_params data_sampler random_ltd ds_config ds_version checkpoint_parallel_dimensions".split()
)
"""DeepSpeed's own entries, beside those that Lightning saved."""

_DEEPSPEEDS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Plain classes that occur in DeepSpeed's shards."""


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder that FSDP or DeepSpeed wrote."""
    return (path / INDEX).is_file() or (path / LATEST).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """Read everything but the weights, and check that no shard is missing or cut off.

    Raises:
        Exception: Whatever the readers raise if the folder is damaged.
    """
    if (folder / INDEX).is_file():
        _check_fsdp(folder)
        return _load(folder / FACTS)
    shards = _deepspeed_shards(folder)
    for file in shards:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file.name} is cut off")
        check_unpacked(file)
        if foreign := set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) - _DEEPSPEEDS:
            raise ValueError(f"{file.name} names {', '.join(sorted(foreign))}, which could run code")
    states = [file for file in shards if file.name.endswith("model_states.pt")]
    facts = _load(states[0])
    world, found = int(facts["dp_world_size"]), sum(file.name.endswith("optim_states.pt") for file in shards)
    if found % world or not found:
        raise ValueError(f"{found} optimizer shards do not fit {world} processes")
    return {key: value for key, value in facts.items() if key not in _OF_THE_ENGINE}


def read_sharded(folder: Path) -> dict[str, Any]:
    """Assemble a checkpoint as Lightning saves it in one file, without the optimizer's state.

    Returns:
        The entries of the checkpoint; ``state_dict`` has whole tensors on the CPU, in float32 from DeepSpeed and in
        the stored dtype from FSDP.

    Raises:
        ModuleNotFoundError: DeepSpeed wrote the folder and is not installed.
        Exception: Whatever else the readers raise if the folder is damaged.
    """
    facts = read_facts(folder)
    weights = _fsdp_weights(folder) if (folder / INDEX).is_file() else _deepspeed_weights(folder)
    return {**facts, "state_dict": weights}


def _fsdp_weights(folder: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    index = _read_index(folder)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

    empty: dict[str, dict[str, Tensor]] = {}
    for key, facts in index.state_dict_metadata.items():
        root, _, name = key.partition(".")
        if root in _ROOTS and isinstance(facts, TensorStorageMetadata):
            empty.setdefault(root, {})[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
    if len(empty) != 1:
        raise ValueError(f"it has no weights under {' or '.join(_ROOTS)}")
    alone: dict[str, Any] = {"no_dist": True} if "no_dist" in signature(load).parameters else {}  # not in torch 2.6
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")  # disabled, unavailable or uninitialized
        load(empty, storage_reader=Reader(folder), **alone)
    return next(iter(empty.values()))


def _check_fsdp(folder: Path) -> None:
    for place in _read_index(folder).storage_data.values():
        file = folder / place.relative_path
        if file.stat().st_size < place.offset + place.length:
            raise ValueError(f"{file.name} is cut off")


def _read_index(folder: Path) -> Any:
    with (folder / INDEX).open("rb") as file:
        return _IndexReader(file).load()


class _IndexReader(pickle.Unpickler):
    """Unpickler that only knows the classes of such an index."""

    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
    )
    _METADATA = "torch.distributed.checkpoint.metadata"

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class; refuse any other."""
        if (module, name) in self._NAMES:
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath  # the folder it was written to, on whatever system; not used
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == self._METADATA and "." not in name:
            found = getattr(import_module(module), name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which does not belong in an index")


def _deepspeed_shards(folder: Path) -> list[Path]:
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    if not tag or Path(tag).name != tag:
        raise ValueError(f"its file 'latest' names {tag[:40]!r}, which is not the name of a folder")
    shards = sorted((folder / tag).glob("*_states.pt"))
    if not any(file.name.endswith("model_states.pt") for file in shards):
        raise ValueError(f"{folder / tag} has no *_model_states.pt")
    return shards


def _deepspeed_weights(folder: Path) -> dict[str, Tensor]:
    with _weights_only(), redirect_stdout(StringIO()):  # it prints its progress
        tool = import_module("deepspeed.utils.zero_to_fp32")
        state: Mapping[str, Any] = tool.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    return {key.removeprefix("_forward_module."): value for key, value in state.items()}


@contextmanager
def _weights_only() -> Iterator[None]:
    """Force ``weights_only=True`` on a tool that asks for the opposite; DeepSpeed's plain classes stay allowed."""
    import_module("deepspeed")  # raises ModuleNotFoundError if it is missing
    known = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sorted(_DEEPSPEEDS)]
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _load(path: Path) -> dict[str, Any]:
    check_unpacked(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path.name} is not a dictionary")
    return loaded
