"""A store at a URL: shards are put whole, fetched once, and made by one rank each."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch
from torch import Tensor

from tests.store.test_features import KEY, SMALL, batches, encoder
from visexpert.errors import ConfigError, DataError
from visexpert.store import FeatureFile, Filling, Place, open_features, place_at, stored_rows, verify, write_features


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid4().hex}/store" if request.param == "memory" else f"file://{tmp_path}/bucket/store"


def there(url: str) -> list[str]:
    files, base = fsspec.core.url_to_fs(url)
    return sorted(str(name).rpartition("/")[2] for name in files.find(base))


def write(place: Place, written: Tensor, filling: Filling = SMALL) -> FeatureFile:
    file = write_features(place, KEY, encoder([written]), filling=filling)
    assert file is not None
    return file


def test_tokens_are_written_there_and_read_from_another_machine(url: str, tmp_path: Path) -> None:
    written = torch.cat(batches())
    write(place_at(url, tmp_path / "one"), written)
    assert there(url) == ["card.json", *(f"shard-{number:06}.safetensors" for number in range(3))]
    other = place_at(url, tmp_path / "two")
    file = open_features(other, KEY)
    assert file is not None and stored_rows(other, KEY) == 5
    assert torch.equal(file.read(torch.tensor([3, 2])), written[[3, 2]])
    fetched = [path.name for path in (tmp_path / "two").rglob("shard-*")]
    assert fetched == ["shard-000001.safetensors"]  # the one that was needed
    assert json.loads(next((tmp_path / "one").rglob("card.json")).read_text("utf-8"))["error"] == 0.0
    assert [found.fault for found in verify(place_at(url, tmp_path / "three"))] == [None] * 3


def test_a_shard_is_fetched_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place_at(url, tmp_path / "one"), torch.cat(batches()))
    place = place_at(url, tmp_path / "two")
    kind = type(place.files)  # type: ignore[attr-defined]
    get, fetched = kind.get_file, list[str]()

    def counted(self: object, path: str, *given: object, **options: object) -> object:
        fetched.append(path.rpartition("/")[2])
        return get(self, path, *given, **options)

    monkeypatch.setattr(kind, "get_file", counted)
    for _ in range(2):
        file = open_features(place, KEY)
        assert file is not None
        for row in (0, 4, 0):
            file.read(torch.tensor([row]))
    assert sorted(name for name in fetched if name.startswith("shard")) == [
        "shard-000000.safetensors",
        "shard-000002.safetensors",
    ]


def test_ranks_make_their_own_shards_and_wait_for_the_others(url: str, tmp_path: Path) -> None:
    written, asked = torch.cat(batches()), [list[int](), list[int]()]

    def fill(rank: int) -> None:
        def encode(rows: range) -> Iterator[Tensor]:
            asked[rank].extend(rows)
            yield written[rows.start : rows.stop]

        filling = replace(SMALL, rank=rank, world=2)
        file = write_features(place_at(url, tmp_path / str(rank)), KEY, encode, filling=filling)
        assert file is not None and torch.equal(file.read(torch.arange(5)), written)

    workers = [threading.Thread(target=fill, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert asked == [[0, 1, 4], [2, 3]]


def test_a_kill_before_a_shard_was_put_costs_no_encoding(url: str, tmp_path: Path) -> None:
    place = place_at(url, tmp_path / "one")
    written = torch.cat(batches())
    write(place, written)
    files, base = fsspec.core.url_to_fs(url)
    files.rm_file(f"{base}/{KEY.name}/shard-000001.safetensors")
    assert open_features(place, KEY) is None
    file = write_features(place, KEY, lambda rows: pytest.fail("encoded again"), filling=SMALL)
    assert file is not None and torch.equal(file.read(torch.arange(5)), written)
    assert len(there(url)) == 4


def test_a_flipped_bit_there_is_found_though_a_whole_copy_is_here(url: str, tmp_path: Path) -> None:
    place = place_at(url, tmp_path / "one")
    written = torch.cat(batches())
    write(place, written)
    files, base = fsspec.core.url_to_fs(url)
    path = f"{base}/{KEY.name}/shard-000001.safetensors"
    content = bytearray(files.cat_file(path))
    content[-3] ^= 4
    files.pipe_file(path, bytes(content))
    (found,) = (each for each in verify(place) if each.fault is not None)
    assert found.name == "shard-000001.safetensors" and url in str(found)
    found.remove()
    assert not found.exists() and stored_rows(place, KEY) == 3
    assert torch.equal(write(place, written).read(torch.arange(5)), written)
    assert [each.fault for each in verify(place)] == [None] * 3


@pytest.mark.parametrize("bad", ["s33://bucket/x", "gs://bucket/x"])
def test_what_fsspec_cannot_open_is_said_at_once(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a protocol|visexpert\[remote\]") as error:
        place_at(bad, tmp_path)
    assert bad in str(error.value)


def test_a_side_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_at("memory://gone/store", tmp_path)

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no credentials\nmore")

    monkeypatch.setattr(type(place.files), "ls", broken)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="memory://gone/store .*no credentials") as error:
        open_features(place, KEY)
    assert "more" not in str(error.value).replace("memory", "")
