"""Text from outside: whatever lies there, a reader raises OSError or ValueError, and never waits for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.test_errors import HOSTILE
from visexpert.data.annotations import read_json as read_annotations
from visexpert.data.annotations import read_json_lines
from visexpert.data.faults import FaultLog
from visexpert.errors import DataError, WeightsError
from visexpert.io.reading import dump_json, parse_json, read_json, read_object, read_text, read_yaml
from visexpert.io.run_files import read_json as read_record
from visexpert.report.compare.record import read_run
from visexpert.types import Skipped

DEEP = "[" * 100_000 + "]" * 100_000


def test_deep_json_is_a_value_error_like_any_damage(tmp_path: Path) -> None:
    with pytest.raises(RecursionError):
        json.loads(DEEP)
    with pytest.raises(ValueError, match="too deeply"):
        parse_json(DEEP)
    path = tmp_path / "deep.json"
    path.write_text(DEEP, encoding="utf-8")
    for read in (read_annotations, read_record):
        with pytest.raises(DataError, match=r"deep\.json.*too deeply"):
            read(path)
    path.write_text(f'{{"a": 1}}\n{DEEP}\n', encoding="utf-8")
    first, second = read_json_lines(path)
    assert first == {"a": 1} and "too deeply" in str(second)


def test_a_run_with_deep_files_is_left_out_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n", encoding="utf-8")
    (tmp_path / "metrics.json").write_text(DEEP, encoding="utf-8")
    assert "too deeply" in (read_run(tmp_path, split="test").problem or "")
    (tmp_path / "config.yaml").write_text("a: " + DEEP, encoding="utf-8")
    assert "cannot be read" in (read_run(tmp_path, split="test").problem or "")


def test_readers_refuse_what_would_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (read_text, read_json, read_yaml):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)
        for told in (read_annotations, read_json_lines, read_record):
            with pytest.raises(DataError, match="not a regular file"):
                told(path)
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="0xe9"):
        read_text(tmp_path / "latin1")


def test_a_key_that_comes_twice_is_refused_and_merged_mappings_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(path)["b"] == {"x": 1, "y": 2}
    path.write_text("a:\n  x: 1\n  x: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: the key 'x' comes twice"):
        read_yaml(path)


LYING = ('!!int ""', '!!float ""', "!!bool x", "!!timestamp x", "!!set [a]", "!!omap {a: 1}", "!!binary é")
"""Values that are not of the kind that their tag says."""


@pytest.mark.parametrize("value", [*LYING, "&x [*x]", "&x {b: *x}"])
def test_yaml_that_lies_is_a_value_error(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"a: {value}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"."):
        read_yaml(path)


def test_aliases_that_grow_are_refused_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(["a0: &a0 [x]", *rows]), encoding="utf-8")
    with pytest.raises(ValueError, match="1,000,000"):
        read_yaml(path)
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\n", encoding="utf-8")
    assert read_yaml(path) == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_json_for_people_is_plain_and_means_the_same() -> None:
    value = {"key": HOSTILE, "word": "Straße 🙂", "list": [1, None]}
    for indent in (None, 2):
        text = dump_json(value, indent=indent)
        assert json.loads(text) == value and "Straße 🙂" in text
        assert all(sign.isprintable() or sign == "\n" for sign in text)


def test_skipped_records_of_hostile_names_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    FaultLog("a", total=9, limit=1, file=path).add([Skipped(HOSTILE, f"The image {HOSTILE} is damaged.")])
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert line.isprintable() and json.loads(line)["key"] == HOSTILE
    path.write_text(line + "\n[1]\n" + DEEP + "\n", encoding="utf-8")
    FaultLog("a", total=9, limit=1, file=path).add([Skipped(HOSTILE, "again"), Skipped("b", "new")])
    assert [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()[3:]] == ["b"]


def test_a_json_object_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_object(path, error=WeightsError, owner="Test", step="fetch it again") == {"a": 1}
    for text, named in (("[1]", "holds a list"), ("{", "cannot read"), (None, "cannot read")):
        path.unlink() if text is None else path.write_text(text, encoding="utf-8")
        with pytest.raises(WeightsError, match=r"^Test: .*; fetch it again\.$") as told:
            read_object(path, error=WeightsError, owner="Test", step="fetch it again")
        assert str(path) in str(told.value) and named in str(told.value)
    with pytest.raises(DataError, match="^cannot read"):
        read_object(path, error=DataError, step="write it again")
