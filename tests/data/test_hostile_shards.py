"""Shards that are made to harm: bombs, names and links that lead out, headers that lie. None costs memory or hangs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats import jpeg_bytes, write_shard
from visexpert.data.shards import MOST_BYTES, ShardReader, iterate_shard, shard_counts
from visexpert.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are cached in a folder of the test's own."""
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))


def good(key: str = "a") -> bytes:
    """A whole record, without the end of a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for suffix, content in (("jpg", jpeg_bytes("red")), ("txt", b"a caption")):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()[: tar.offset]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that states a size, whatever follows it."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(name: str, **records: str) -> bytes:
    """A member of no bytes behind an extended header."""
    member = tarfile.TarInfo(name)
    member.pax_headers = dict(records)
    return member.tobuf(tarfile.PAX_FORMAT)


def sparse(size: int) -> bytes:
    """A file with holes: no byte in the tar, ``size`` once it is read."""
    return pax("b.jpg", **{"GNU.sparse.map": f"{size},0", "GNU.sparse.size": str(size), "GNU.sparse.name": "b.jpg"})


def checksummed(block: bytearray) -> bytes:
    """A header whose bytes were changed, with the checksum that belongs to them."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative() -> bytes:
    """A header of size -512, in the binary form of GNU: a reader that goes on from it meets it again."""
    block = bytearray(header("b.jpg", 0))
    block[124:136] = (-512).to_bytes(12, "big", signed=True)
    return checksummed(block)


LYING: dict[str, Callable[[], bytes]] = {
    "holes": lambda: sparse(MOST_BYTES + 1),
    "a size of more than the tar has": lambda: header("b.jpg", 2**33),
    "a size in an extended header": lambda: pax("b.jpg", size=str(2**40)),
    "a size below 0 in an extended header": lambda: pax("b.jpg", size="-1024"),
    "a size below 0": negative,
    "a long name": lambda: header("././@LongLink", 2**24, tarfile.GNUTYPE_LONGNAME),
    "a large extended header": lambda: header("b.jpg", 2**24, tarfile.XHDTYPE),
    "a link of that size": lambda: header("b.jpg", -1 & 2**32, tarfile.LNKTYPE),
    "headers on headers": lambda: b"".join(header("b.jpg", 0, tarfile.XHDTYPE) for _ in range(2000)),
}


@pytest.mark.parametrize("kind", LYING)
def test_a_header_that_lies_ends_its_shard_and_costs_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(good() + LYING[kind]() + good("c") + b"\0" * 1024)
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        list(iterate_shard(str(path)))
    with pytest.raises(DataError, match=r"a\.tar cannot be counted"):
        shard_counts([str(path)], sizes=None)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zeros(size: int, kind: str) -> bytes:
    """A compressed tar whose one image is zeros."""
    return PACK[kind](good() + header("b.jpg", size) + b"\0" * size + b"\0" * 1024)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_shard_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.tar.{kind}"
    path.write_bytes(zeros(2**26, kind))
    with pytest.raises(DataError, match=r"cannot be counted.*times its size"):
        shard_counts([str(path)], sizes=None)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("half", [True, False])
def test_a_compressed_shard_that_is_damaged_is_one_sentence(tmp_path: Path, kind: str, half: bool) -> None:
    whole = write_shard(tmp_path / "b.tar", [(str(k), np.random.default_rng(k).bytes(30_000), "a") for k in range(40)])
    content = bytearray(PACK[kind](whole.read_bytes()))
    path = tmp_path / f"a.tar.{kind}"
    if half:
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    got = list(ShardReader([str(path)], [40]).read(np.array([[0, place] for place in range(40)])))
    assert isinstance(got[-1], DataError) and all(isinstance(each, dict) or path.name in str(each) for each in got)
    with pytest.raises(DataError, match=rf"a\.tar\.{kind} cannot be counted"):
        shard_counts([str(path)], sizes=None)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for damaged in (b"x" * 512, b"x" * 100):
        path.write_bytes(good() + damaged + (good("c") + b"\0" * 1024 if len(damaged) == 512 else b""))
        with pytest.raises(DataError, match=r"a\.tar is damaged"):
            list(iterate_shard(str(path)))
        with pytest.raises(DataError, match=r"a\.tar cannot be counted"):
            shard_counts([str(path)], sizes=None)


def test_a_record_of_too_many_bytes_is_left_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.data.shards.MOST_BYTES", 4000)
    many = b"".join(header(f"b.{number}", 0) for number in range(8))
    path = tmp_path / "a.tar"
    path.write_bytes(good() + many + good("c") + b"\0" * 1024)
    first, second, third = ShardReader([str(path)]).read(np.array([[0, 0], [0, 1], [0, 2]]))
    assert isinstance(first, dict) and isinstance(third, dict)
    assert isinstance(second, DataError) and "a.tar/b" in str(second) and "4,000" in str(second)


def test_names_and_links_that_lead_out_of_a_shard_lead_nowhere(tmp_path: Path) -> None:
    """Nothing is unpacked: a name is a key, and a link is no file."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    path = tmp_path / "shards" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../out.jpg", "/tmp/out-of-the-shard.jpg", "a/../../out.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.txt")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    records = list(iterate_shard(str(path)))
    assert [record["__key__"] for record in records if isinstance(record, dict)] == [
        "../out",
        "/tmp/out-of-the-shard",
        "a/../../out",
    ]
    assert all(set(record) == {"__key__", "jpg"} for record in records if isinstance(record, dict))
    assert sorted(tmp_path.rglob("*")) == before and not os.path.lexists("/tmp/out-of-the-shard.jpg")
