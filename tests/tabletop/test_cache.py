"""The render cache: exact content, the same bytes however it is made, and nothing half-valid after an accident."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock

from visexpert.errors import DataError
from visexpert.tabletop import cache
from visexpert.tabletop.cache import NORMAL_SCALE, SplitCache, ensure_split, split_seed
from visexpert.tabletop.render import attribute_masks, class_masks, render, scene_graphs
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.world import TabletopWorld

WORLD = TabletopWorld(image_size=32)
NUM = 20


def _ensure(root: Path, **changes: Any) -> SplitCache:
    settings: dict[str, Any] = {"split": "train", "num_scenes": NUM, "seed": 3, "world": WORLD, "progress": False}
    return ensure_split(root, **(settings | changes))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitCache:
    return _ensure(tmp_path_factory.mktemp("tabletop"))


def test_arrays_hold_what_the_renderer_gives(split: SplitCache) -> None:
    scenes = sample_scenes(NUM, seed=split_seed(3, "train"), world=WORLD)
    rendered = render(scenes, size=32)
    assert len(split) == NUM
    np.testing.assert_array_equal(split.rgb, rendered.rgb_NHW3)
    np.testing.assert_array_equal(split.instance, rendered.instance_NHW)
    np.testing.assert_array_equal(split.edges, rendered.edges_NHW)
    np.testing.assert_allclose(split.depth, rendered.depth_NHW, rtol=2**-11)  # half precision
    np.testing.assert_allclose(split.normals / NORMAL_SCALE, rendered.normals_NHW3, atol=0.51 / NORMAL_SCALE)
    assert split.graphs == scene_graphs(scenes, rendered)
    masks = class_masks(
        torch.tensor(split.instance), {name: torch.tensor(values) for name, values in split.attributes.items()}
    )
    for name, mask in attribute_masks(rendered, scenes).items():
        assert torch.equal(masks[name], mask), name


def test_arrays_are_memory_mapped_and_read_only(split: SplitCache) -> None:
    assert isinstance(split.rgb, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        split.rgb[0] = 0


def test_an_existing_split_is_not_rendered_again(split: SplitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(cache, "_render_to", refuse)
    assert _ensure(split.path.parent).fingerprint == split.fingerprint


def test_worker_count_does_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MIN_SCENES_FOR_WORKERS", 0)
    monkeypatch.setattr(cache, "CHUNK", 6)
    folders = [_ensure(tmp_path / str(count), num_workers=count).path for count in (0, 1, 2)]
    digests = [_digests(folder) for folder in folders]
    assert digests[0] == digests[1] == digests[2]
    assert {folder.name for folder in folders} == {folders[0].name}


def test_chunk_size_does_not_change_a_byte(split: SplitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 7)
    assert _digests(_ensure(tmp_path).path) == _digests(split.path)


def test_rendering_leaves_the_callers_random_numbers_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(0)
    _ensure(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_splits_and_seeds_share_no_scene_and_longer_ones_begin_alike(split: SplitCache, tmp_path: Path) -> None:
    seen = {row.tobytes() for row in split.geometry}
    for other in (_ensure(tmp_path, split="test"), _ensure(tmp_path, seed=4)):
        assert other.fingerprint != split.fingerprint
        assert not seen & {row.tobytes() for row in other.geometry}
    longer = _ensure(tmp_path, num_scenes=NUM + 5)
    np.testing.assert_array_equal(longer.rgb[:NUM], split.rgb)
    assert longer.path.name != split.path.name


def test_another_world_is_another_split(split: SplitCache) -> None:
    other = _ensure(split.path.parent, world=replace(WORLD, noise=0.0))
    assert other.path != split.path
    assert not np.array_equal(other.rgb, split.rgb)


_SLOW_CHILD = """
import sys, time
from pathlib import Path
from visexpert.tabletop import cache
from visexpert.tabletop.world import TabletopWorld

append = cache._append
def slow(files, arrays):
    append(files, arrays)
    for file in files.values():
        file.flush()
    print("chunk", flush=True)
    time.sleep({pause})

cache._append, cache.CHUNK = slow, 4
cache.ensure_split(Path(sys.argv[1]), split="train", num_scenes={num}, seed=3,
                   world=TabletopWorld(image_size=32), progress=False)
"""


class _Child(NamedTuple):
    process: subprocess.Popen[str]

    def wait_for_a_chunk(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "chunk\n"


def _slow_child(root: Path, pause: float) -> _Child:
    code = _SLOW_CHILD.format(pause=pause, num=NUM)
    return _Child(subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True))


def test_a_killed_render_leaves_nothing_valid_and_the_next_one_succeeds(split: SplitCache, tmp_path: Path) -> None:
    child = _slow_child(tmp_path, pause=60)
    child.wait_for_a_chunk()
    child.process.send_signal(signal.SIGKILL)
    assert child.process.wait() == -signal.SIGKILL
    (partial,) = _leftovers(tmp_path)
    assert partial != split.path.name
    assert not (tmp_path / partial / "manifest.json").exists()
    assert _digests(_ensure(tmp_path).path) == _digests(split.path)
    assert _leftovers(tmp_path) == [split.path.name]


def test_two_processes_at_once_render_one_sound_split(
    split: SplitCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = _slow_child(tmp_path, pause=0.4)
    child.wait_for_a_chunk()
    ours = _ensure(tmp_path)  # waits, then opens the other's result
    assert "is rendering" in caplog.text
    assert child.process.wait() == 0
    assert _digests(ours.path) == _digests(split.path)
    assert _leftovers(tmp_path) == [split.path.name]


def test_a_lock_that_is_let_go_without_a_result_is_taken_over(split: SplitCache, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / f".{split.path.name}.lock", thread_local=False)
    lock.acquire()
    timer = threading.Timer(0.2, lock.release)
    timer.start()
    assert len(_ensure(tmp_path)) == NUM
    timer.join()


def test_a_disk_without_enough_room_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    with pytest.raises(DataError, match=r"is full: rendering needs [\d,]+ bytes, but 1,234 are free") as caught:
        _ensure(tmp_path)
    assert "\n" not in str(caught.value)
    assert _leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("accident", "seen"),
    [(OSError(errno.ENOSPC, "No space left on device"), DataError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_disk_that_fills_up_or_an_interrupt_while_rendering_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: BaseException, seen: type[BaseException]
) -> None:
    calls = []

    def fail_at_the_second(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise accident

    monkeypatch.setattr(cache, "CHUNK", 8)
    monkeypatch.setattr(cache, "_append", fail_at_the_second)
    with pytest.raises(seen, match="disk of .* is full" if seen is DataError else None):
        _ensure(tmp_path)
    assert len(calls) == 2
    assert _leftovers(tmp_path) == []


def test_a_root_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Rendered scenes .*file"):
        _ensure(tmp_path / "file")


@pytest.mark.parametrize("changes", [{"num_scenes": 0}, {"split": "../train"}, {"split": ""}])
def test_a_split_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be rendered"):
        _ensure(tmp_path, **changes)


def _truncate(folder: Path) -> None:
    path = folder / "depth.npy"
    path.write_bytes(path.read_bytes()[:-100])


def _lengthen(folder: Path) -> None:
    with open(folder / "rgb.npy", "ab") as file:
        file.write(b"\0" * 10)


def _drop(folder: Path) -> None:
    (folder / "normals.npy").unlink()


def _swap(folder: Path) -> None:
    np.save(folder / "edges.npy", np.zeros((2, 2), dtype=np.uint8))


def _garble(folder: Path) -> None:
    (folder / "rgb.npy").write_bytes(b"no array")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"split": "train"')


def _odd_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"arrays": [1, 2]}))


@pytest.mark.parametrize(
    "damage", [_truncate, _lengthen, _drop, _swap, _garble, _no_manifest, _cut_manifest, _odd_manifest]
)
def test_damage_is_found_and_the_folder_to_delete_is_named(tmp_path: Path, damage: Any) -> None:
    folder = _ensure(tmp_path).path
    damage(folder)
    with pytest.raises(DataError, match=f"{folder} is damaged .*delete this folder"):
        _ensure(tmp_path)
    assert folder.exists()  # deleting is left to the user
