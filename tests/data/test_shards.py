"""Who reads which record of which shard: each exactly once, in an order that can be taken up anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats import write_json, write_shard, write_shards
from visexpert import trust
from visexpert.data.shard_loader import ShardPlan
from visexpert.data.shards import ShardReader, expand_shards, iterate_shard, shard_counts
from visexpert.errors import ConfigError, DataError

COUNTS = (7, 13, 1, 0, 22, 9, 30, 4)
PLAN = ShardPlan(counts=COUNTS, batch_size=3, shuffle=True, drop_last=True, seed=5, window=4)

Pairs = list[tuple[int, int]]


def of_reader(plan: ShardPlan, epoch: int, reader: int, *, lane: int = 0, skip: int = 0) -> list[Pairs]:
    batches = []
    for lying, places in plan.windows(epoch, lane, reader, skip=skip):
        batches += [[(int(s), int(k)) for s, k in lying[chosen]] for chosen in places]
    return batches


def everything() -> set[tuple[int, int]]:
    return {(shard, place) for shard, count in enumerate(COUNTS) for place in range(count)}


@pytest.mark.parametrize(("lanes", "readers"), [(1, 1), (1, 3), (2, 1), (2, 4), (5, 2), (8, 3)])
def test_lanes_times_readers_cover_every_record_exactly_once(lanes: int, readers: int) -> None:
    plan = replace(PLAN, drop_last=False, lanes=lanes, readers=readers)
    for epoch in (0, 3):
        read = [
            pair
            for lane, reader in product(range(lanes), range(readers))
            for batch in of_reader(plan, epoch, reader, lane=lane)
            for pair in batch
        ]
        assert len(read) == sum(COUNTS) and set(read) == everything()


@pytest.mark.parametrize(("lanes", "readers"), [(1, 2), (2, 3), (4, 1)])
def test_training_leaves_out_less_than_a_step(lanes: int, readers: int) -> None:
    plan = replace(PLAN, lanes=lanes, readers=readers)
    left_out = []
    for epoch in range(6):
        read: Pairs = []
        for lane in range(lanes):
            batches = [of_reader(plan, epoch, reader, lane=lane) for reader in range(readers)]
            assert sum(map(len, batches)) == plan.num_steps == 86 // (3 * lanes)
            assert max(map(len, batches)) - min(map(len, batches)) <= 1
            assert all(len(batch) == 3 for part in batches for batch in part)
            read += [pair for part in batches for batch in part for pair in batch]
        assert len(read) == len(set(read)) > sum(COUNTS) - 3 * lanes
        left_out.append(frozenset(everything() - set(read)))
    assert len(set(left_out)) > 1  # not always the same ones


def test_epochs_differ_and_repeat() -> None:
    first, second = of_reader(PLAN, 0, 0), of_reader(PLAN, 1, 0)
    assert first != second and first == of_reader(PLAN, 0, 0)
    assert of_reader(replace(PLAN, seed=6), 0, 0) != first


def test_records_are_shuffled_within_a_window_only() -> None:
    lying, batches = next(PLAN.windows(0, 0, 0))
    assert len(lying) == 12 and sorted(np.concatenate(batches).tolist()) == list(range(12))
    assert np.concatenate(batches).tolist() != list(range(12))
    shards = lying[:, 0].tolist()
    assert len(set(shards)) == sum(a != b for a, b in zip(shards, shards[1:], strict=False)) + 1  # end to end


def test_without_shuffling_records_come_as_they_lie() -> None:
    plan = replace(PLAN, shuffle=False, drop_last=False)
    assert [pair for batch in of_reader(plan, 4, 0) for pair in batch] == sorted(everything())


@pytest.mark.parametrize("skip", [1, 4, 5, 11, 28])
def test_it_goes_on_where_it_was(skip: int) -> None:
    assert of_reader(PLAN, 2, 0, skip=skip) == of_reader(PLAN, 2, 0)[skip:]


def test_a_reader_goes_on_from_shard_to_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    reader = ShardReader([str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")])
    got = list(reader.read(np.array([[1, 1], [1, 3], [0, 0], [0, 2]])))
    assert [record["txt"] for record in got if isinstance(record, dict)] == [
        b"record 1 1",
        b"record 1 3",
        b"record 0 0",
        b"record 0 2",
    ]


def test_a_shard_that_is_cut_short_loses_its_rest_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, [6, 2])
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    reader = ShardReader([str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")])
    got = list(reader.read(np.array([[0, k] for k in range(6)] + [[1, 0]])))
    kinds = [isinstance(record, dict) for record in got]
    assert kinds[0] and kinds[-1] and not kinds[5]
    errors = [str(record) for record in got if isinstance(record, DataError)]
    assert "00000.tar is damaged" in errors[0] and all("00000.tar" in error for error in errors)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        next(iterate_shard(str(tmp_path / "none.tar")))


@pytest.mark.parametrize("form", ["pipe:{}", "PIPE:{}", "pIpE:{}"])
def test_a_shard_that_is_a_command_is_refused(tmp_path: Path, form: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match=r"would run a command.*--allow_pipe true"):
        next(iterate_shard(form.format(f"touch {marker}")))
    assert not marker.exists()


@pytest.mark.parametrize("form", [" pipe:{}", "pi\tpe:{}", "\npipe:{}", "pip{{e..e}}:{}"])
def test_no_spelling_of_a_command_is_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """webdataset's URLs may have white space before and inside their scheme."""
    monkeypatch.chdir(tmp_path)
    for name in expand_shards(form.format("touch marker"), Path(".")):
        with pytest.raises((ConfigError, DataError)):
            next(iterate_shard(name))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("scheme", ["http", "https", "gs", "s3", "hf", "ais"])
def test_a_url_cannot_become_a_command(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(ConfigError, match="%20"):
        next(iterate_shard(f"{scheme}://host/a.tar'; touch {tmp_path}/marker; '"))
    assert not (tmp_path / "marker").exists()


def test_a_pipe_is_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.PIPE, "1")
    write_shards(tmp_path, [3])
    records = iterate_shard(f"pipe:cat {tmp_path}/00000.tar")
    first = next(records)
    assert isinstance(first, dict) and first["txt"] == b"record 0 0"
    records.close()  # type: ignore[attr-defined]  # left before its end, without complaint


def test_braces_are_expanded_and_local_names_lie_under_the_root() -> None:
    assert expand_shards("{00000..00002}.tar", Path("/data")) == [f"/data/0000{k}.tar" for k in range(3)]
    remote = "https://host/cc3m-train-{0009..0010}.tar::more.tar"
    assert expand_shards(remote, Path("/data")) == [
        "https://host/cc3m-train-0009.tar",
        "https://host/cc3m-train-0010.tar",
        "/data/more.tar",
    ]
    with pytest.raises(ConfigError, match="cannot be expanded"):
        expand_shards("{0..1.tar", Path("/data"))


def test_counts_come_from_notes_or_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path, [3, 5], stats=False)
    shards = [str(tmp_path / f"0000{k}.tar") for k in (0, 1)]
    assert shard_counts(shards, sizes=None) == (3, 5)  # counted
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 2
    write_json(tmp_path / "00001_stats.json", {"count": 9, "successes": 4})
    assert shard_counts(shards, sizes=None) == (3, 4)  # img2dataset's own count
    write_json(tmp_path / "sizes.json", {"00000.tar": 2})
    assert shard_counts(shards, sizes=None) == (2, 4)
    sizes = write_json(tmp_path / "elsewhere.json", {"00000.tar": 1, "00001.tar": 1})
    assert shard_counts(shards, sizes=sizes) == (1, 1)
    assert shard_counts(["https://host/00001.tar"], sizes=sizes) == (1,)


def test_remote_shards_are_not_read_to_count_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"https://host/0.tar.*sizes"):
        shard_counts(["https://host/0.tar"], sizes=None)


def test_headers_are_counted_anew_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    path = write_shard(tmp_path / "a.tar", [("1", b"x", "a"), ("2", b"x", "b")])
    assert shard_counts([str(path)], sizes=None) == (2,)
    notes = next((tmp_path / "cache" / "shards").iterdir())
    assert json.loads(notes.read_text()) == 2
    write_shard(path, [(str(k), b"x" * 5000, "a") for k in range(7)])
    assert shard_counts([str(path)], sizes=None) == (7,)
    path.write_bytes(b"no tar" * 999)
    with pytest.raises(DataError, match=r"a.tar cannot be counted"):
        shard_counts([str(path)], sizes=None)
