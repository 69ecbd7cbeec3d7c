"""Render a split of the embedded world to disk once, then memory-map it.

A split is a folder of ``.npy`` arrays with a ``manifest.json``. It is written under a temporary name and renamed
at the end, so a folder with the final name is complete; a lock lets one process render while others wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from visexpert.data.workers import load
from visexpert.errors import DataError
from visexpert.io.files import take_place
from visexpert.io.reading import read_json
from visexpert.tabletop.graph import SceneGraph
from visexpert.tabletop.render import build_graphs, object_table, render
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.world import TabletopWorld

Array: TypeAlias = npt.NDArray[Any]

CHUNK = 64
"""Scenes that a worker renders at a time."""

NORMAL_SCALE = 127.0
"""Stored normals are ``round(normal * NORMAL_SCALE)``."""

_FORMAT = 1
_MANIFEST = "manifest.json"
_SPARE_BYTES = 16 * 2**20  # free space to leave on the disk
_MIN_SCENES_FOR_WORKERS = 4 * CHUNK
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitCache:
    """A rendered split; the arrays are read-only views of the files.

    Args:
        path: The folder.
        split: Name of the split.
        fingerprint: Digest of everything that the content depends on (split, seed, number of scenes, world, renderer).
        rgb: uint8 (N, H, W, 3).
        depth: float16 (N, H, W), along the optical axis, scene units.
        normals: int8 (N, H, W, 3), camera frame (right, up, towards the viewer), times ``NORMAL_SCALE``.
        instance: uint8 (N, H, W), 0 = table, k = object in slot k - 1.
        edges: bool (N, H, W).
        classes: int8 (N, O, 4): shape, colour, size, material index, -1 in empty slots.
        geometry: float32 (N, O, 5): u, v, depth, height, visible pixels (see
            :class:`~visexpert.tabletop.graph.ObjectNode`).
    """

    path: Path
    split: str
    fingerprint: str
    rgb: Array
    depth: Array
    normals: Array
    instance: Array
    edges: Array
    classes: Array
    geometry: Array

    def __len__(self) -> int:
        return len(self.rgb)

    @cached_property
    def attributes(self) -> dict[str, Array]:
        """Class of every object by attribute: int8 (N, O), -1 in empty slots; see ``render.class_masks`` for pixels."""
        return {name: self.classes[..., i] for i, name in enumerate(("shape", "colour", "size", "material"))}

    @cached_property
    def graphs(self) -> list[SceneGraph]:
        """Scene graph of each image."""
        return build_graphs(self.classes.tolist(), self.geometry.tolist())


def ensure_split(
    root: Path,
    *,
    split: str,
    num_scenes: int,
    seed: int,
    world: TabletopWorld,
    num_workers: int = 2,
    progress: bool = True,
) -> SplitCache:
    """Open a split, rendering it first if it is missing.

    Every (seed, split name) has its own stream of scenes (:func:`split_seed`), so splits never share a scene, and a
    longer split begins with the scenes of a shorter one.

    Args:
        root: Folder that holds rendered splits.
        split: Name, such as ``train``.
        num_scenes: Number of scenes.
        seed: Any integer.
        world: Settings.
        num_workers: Rendering processes with one thread each; the result does not depend on it. 0 renders in this
            process.
        progress: Show a progress bar with the time left.

    Raises:
        DataError: If the disk is full, the folder cannot be written, or the split on disk is damaged.
    """
    if num_scenes < 1 or not split.replace("-", "").replace("_", "").isalnum():
        raise DataError(
            f"The split {split!r} with {num_scenes} scenes cannot be rendered; give it a name of letters, digits, - "
            "and _, and at least one scene."
        )
    spec = _spec(split, num_scenes, seed, world)
    final = root / f"{split}-{spec['fingerprint']}"
    if not final.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                _acquire(stack, FileLock(root / f".{final.name}.lock"), final)
                if not final.exists():
                    _render_to(final, spec, world, num_workers, progress)
        except OSError as error:
            raise _write_error(error, root, _bytes_needed(spec)) from error
    return open_split(final)


def open_split(folder: Path) -> SplitCache:
    """Open a rendered split.

    Raises:
        DataError: If a file is missing, damaged, or shorter than the manifest says.
    """
    arrays: dict[str, Array] = {}
    try:
        manifest = read_json(folder / _MANIFEST)
        expected = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in manifest["arrays"].items()}
        for name in _layout(1, 1, 1):
            arrays[name] = _open_array(folder / f"{name}.npy", *expected[name])
        return SplitCache(path=folder, split=manifest["split"], fingerprint=manifest["fingerprint"], **arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(
            f"The rendered split in {folder} is damaged ({error}); delete this folder to render it again."
        ) from error


def split_seed(seed: int, split: str) -> int:
    """Return the seed of a split's own stream of scenes: 63 bits of a digest of (seed, split name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class _Chunks(Dataset[dict[str, Array]]):
    """Chunk i holds the arrays of scenes i * CHUNK to (i + 1) * CHUNK - 1 of a stream."""

    num_scenes: int
    seed: int
    world: TabletopWorld

    def __len__(self) -> int:
        return math.ceil(self.num_scenes / CHUNK)

    def __getitem__(self, index: int) -> dict[str, Array]:
        first = index * CHUNK
        scenes = sample_scenes(min(CHUNK, self.num_scenes - first), seed=self.seed, first=first, world=self.world)
        rendered = render(scenes, size=self.world.image_size)
        classes_NO4 = torch.stack([scenes.shape_NO, scenes.colour_NO, scenes.size_NO, scenes.material_NO], dim=-1)
        return {
            "rgb": rendered.rgb_NHW3.numpy(),
            "depth": rendered.depth_NHW.half().numpy(),
            "normals": torch.round(rendered.normals_NHW3 * NORMAL_SCALE).to(torch.int8).numpy(),
            "instance": rendered.instance_NHW.numpy(),
            "edges": rendered.edges_NHW.numpy(),
            "classes": classes_NO4.to(torch.int8).numpy(),
            "geometry": object_table(scenes, rendered).numpy(),
        }


def _render_to(final: Path, spec: Mapping[str, Any], world: TabletopWorld, num_workers: int, progress: bool) -> None:
    """Render into a folder beside ``final`` and rename it at the end; the caller holds the lock."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: thanks to the lock, nobody else writes there
    needed, free = _bytes_needed(spec), shutil.disk_usage(final.parent).free
    if free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    chunks = _Chunks(num_scenes=spec["num_scenes"], seed=split_seed(spec["seed"], spec["split"]), world=world)
    partial.mkdir()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(partial / f"{name}.npy", "wb")) for name in spec["arrays"]}
            for name, entry in spec["arrays"].items():
                header = {"descr": np.dtype(entry["dtype"]).str, "fortran_order": False, "shape": tuple(entry["shape"])}
                np.lib.format.write_array_header_1_0(files[name], header)
            bar = stack.enter_context(
                tqdm(total=chunks.num_scenes, desc=f"rendering {spec['split']}", unit="scene", disable=not progress)
            )
            for arrays in _render_chunks(chunks, num_workers):
                _append(files, arrays)
                bar.update(len(arrays["rgb"]))
        with open(partial / _MANIFEST, "w", encoding="utf-8") as manifest:
            json.dump(spec, manifest, indent=2)
        take_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, not {dtype} {shape}")
    if not isinstance(array, np.memmap) or array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(f"{path.name} is longer than its array")
    return array


def _append(files: Mapping[str, BinaryIO], arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        files[name].write(np.ascontiguousarray(array).data)


def _render_chunks(chunks: _Chunks, num_workers: int) -> Iterator[dict[str, Array]]:
    """Yield all chunks in order, from one-thread workers or, for a few scenes, from this process."""
    if chunks.num_scenes < _MIN_SCENES_FOR_WORKERS:
        num_workers = 0
    # A loader draws a seed when it starts; with its own generator, rendering does not advance the caller's.
    generator = torch.Generator()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations, which a second thread slows down
    try:
        yield from load(chunks, num_workers=num_workers, generator=generator)
    finally:
        torch.set_num_threads(num_threads)


def _spec(split: str, num_scenes: int, seed: int, world: TabletopWorld) -> dict[str, Any]:
    """Return the manifest: everything that the content depends on, its digest, and the arrays."""
    content = {"format": _FORMAT, "split": split, "num_scenes": num_scenes, "seed": seed, "world": world.fingerprint()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    layout = _layout(num_scenes, world.image_size, world.max_objects)
    arrays = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in layout.items()}
    return {**content, "fingerprint": digest, "settings": asdict(world), "arrays": arrays}


def _layout(num: int, size: int, slots: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "rgb": ((num, size, size, 3), "uint8"),
        "depth": ((num, size, size), "float16"),
        "normals": ((num, size, size, 3), "int8"),
        "instance": ((num, size, size), "uint8"),
        "edges": ((num, size, size), "bool"),
        "classes": ((num, slots, 4), "int8"),
        "geometry": ((num, slots, 5), "float32"),
    }


def _bytes_needed(spec: Mapping[str, Any]) -> int:
    return sum(math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for entry in spec["arrays"].values())


def _acquire(stack: ExitStack, lock: FileLock, final: Path) -> None:
    try:
        stack.enter_context(lock.acquire(timeout=1.0))
    except Timeout:
        _LOG.warning("Another process is rendering %s; waiting for it to finish", final)
        stack.enter_context(lock.acquire())


def _write_error(error: OSError, root: Path, needed: int) -> DataError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"Rendered scenes cannot be written to {root} ({error}); choose a writable cache folder.")
    free = shutil.disk_usage(root).free
    return DataError(
        f"The disk of {root} is full: rendering needs {needed:,} bytes, but {free:,} are free; "
        "free some space, render fewer scenes, or choose another cache folder."
    )
