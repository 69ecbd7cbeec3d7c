"""Readers of what comes from outside, on whatever hypothesis thinks of: they read it, or raise errors of ours alone.

Each file is either arbitrary or a valid one with a few edits, of which more gets through the first checks. Examples are
few and always the same; to look for more, raise ``max_examples`` and leave ``derandomize`` out.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.data.formats import annotation, jpeg_bytes, tokenizer_folder, write_json, write_vqa
from visexpert.checking import check_config_file
from visexpert.data import POPE, VSR, COCOCaptions, ImageShards, ImageTable, LLaVAInstruct, VQAv2
from visexpert.data.annotations import StreamError, read_json_lines, read_json_list, stream_json_list
from visexpert.data.shards import iterate_shard, shard_counts
from visexpert.data.source import SourceData
from visexpert.errors import UserError
from visexpert.io.checkpoints import checked_checkpoint, load_checkpoint, newest_checkpoint
from visexpert.io.reading import read_yaml
from visexpert.io.run_folder import version_of
from visexpert.io.weights import load_state, state_keys
from visexpert.planning.read import parse_configs
from visexpert.runs import load_run
from visexpert.shipped import shipped
from visexpert.store import FeatureKey, Filling, open_features, verify, write_features
from visexpert.store.shard import shards_of
from visexpert.trust import refuse_strangers

FUZZ = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(FUZZ, max_examples=12)
"""For readers that take a quarter of a second each."""

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=[]), max_size=12) | st.sampled_from(
    ["", " ", "\0", "\ud800", "../x", "/etc/passwd", "<image>", "a" * 300, "1" * 5000, "~", "None", "nan"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, b"[" * 5000])
    ),
    min_size=1,
    max_size=4,
)
"""Where, how many bytes are taken out, and what is put in."""


def edited(content: bytes, edits: list[tuple[float, int, bytes]], cut: bool) -> bytes:
    changed = bytearray(content)
    for where, taken, put in edits:
        start = int(where * len(changed))
        changed[start : start + taken] = put
    return bytes(changed[: len(changed) // 2] if cut else changed)


def files(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, and valid files with edits."""
    return st.binary(max_size=200) | st.builds(edited, st.sampled_from(valid), EDITS, st.booleans())


def read_all(*readers: Callable[[], Any], also: tuple[type[Exception], ...] = ()) -> None:
    """Call readers; whatever they raise is an error of ours, in one line."""
    for reader in readers:
        try:
            reader()
        except UserError as error:
            assert str(error) and "\n" not in str(error)
        except also:
            pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("fuzz")
    tokenizer_folder(made / "words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["visexpert"])
        yield made


# -- Annotations ------------------------------------------------------------------------------------------------------

RECORD = json.dumps(
    [{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}], "id": 1}, {"a": [1, 2.5e3]}]
)


@FUZZ
@given(files(RECORD.encode(), RECORD.replace("}, ", "}\n").strip("[]").encode()))
def test_annotation_files(folder: Path, content: bytes) -> None:
    path = folder / "records.json"
    path.write_bytes(content)
    read_all(
        lambda: read_json_list(path),
        lambda: read_json_list(path, "images"),
        lambda: read_json_lines(path),
    )
    read_all(lambda: list(stream_json_list(path)), also=(StreamError, OSError))  # which its caller answers


def with_edits(record: Any, paths: list[tuple[int, Any]]) -> Any:
    """A copy of a decoded record in which some values, counted through, are others."""
    changes, count = dict(paths), iter(range(1000))

    def changed(value: Any) -> Any:
        number = next(count)
        if number in changes:
            return changes[number]
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        return [changed(inner) for inner in value] if isinstance(value, list) else value

    return changed(record)


CHANGES = st.lists(st.tuples(st.integers(0, 12), JSON), min_size=1, max_size=3)
KARPATHY = {
    "filepath": "val2014",
    "filename": "1.jpg",
    "split": "test",
    "cocoid": 1,
    "sentences": [{"raw": "a dog", "sentid": 1}],
}
CHAT = {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
QUESTION = {"image_id": 9, "question": "what ?", "question_id": 1}
PROBE = {"question_id": 1, "image": "1.jpg", "text": "Is it a dog?", "label": "no"}
CLAIM = {"image": "1.jpg", "image_link": "http://x/val2017/1.jpg", "caption": "It is.", "label": 1, "relation": "on"}
ROW = {"image": "1.jpg", "caption": "a dog", "question": "what ?", "answer": "a dog"}


def read_source(kind: type[SourceData], folder: Path, part: str, **more: Any) -> None:
    options: dict[str, Any] = {
        "root": str(folder),
        "tokenizer": str(folder / "words"),
        "image_size": 8,
        "num_workers": 0,
    }
    source = kind(**options, max_broken=1.0, **more)
    table = source.table(part)  # type: ignore[attr-defined]
    for sample in table:
        for item in sample.items:
            assert isinstance(item.prompt, str)


@FUZZ
@given(CHANGES | JSON.map(lambda value: [(0, value)]))
def test_records_of_every_data_set(folder: Path, changes: list[tuple[int, Any]]) -> None:
    def change(record: dict[str, Any]) -> Any:
        return with_edits(record, changes)

    write_json(folder / "dataset_coco.json", {"images": [change(KARPATHY), KARPATHY]})
    write_json(folder / "talk.json", [change(CHAT), CHAT])
    write_vqa(folder, "val", [change(QUESTION)], [change(annotation(1, 9, ["red"] * 10, "other"))])
    for name in (
        "coco_pope_random.json",
        "coco_pope_popular.json",
        "coco_pope_adversarial.json",
        "zeroshot/test.jsonl",
    ):
        record = CLAIM if "zeroshot" in name else PROBE
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in (change(record), record)))
    (folder / "rows.jsonl").write_text(json.dumps(change(ROW)) + "\n" + json.dumps(ROW) + "\n")
    read_all(
        lambda: read_source(COCOCaptions, folder, "test"),
        lambda: read_source(LLaVAInstruct, folder, "train", annotations="talk.json"),
        lambda: read_source(VQAv2, folder, "val"),
        lambda: read_source(POPE, folder, "test"),
        lambda: read_source(VSR, folder, "test"),
        lambda: read_source(ImageTable, folder, "train", train="rows.jsonl"),
    )


# -- Shards -----------------------------------------------------------------------------------------------------------


def a_shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.jpg", jpeg_bytes("red")), ("a.json", b'{"caption": "x"}'), ("ü" * 90 + ".txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@FUZZ
@given(files(a_shard()))
def test_shards(folder: Path, content: bytes) -> None:
    path = folder / "00000.tar"
    path.write_bytes(content)
    options: dict[str, Any] = {
        "root": str(folder),
        "tokenizer": str(folder / "words"),
        "image_size": 8,
        "num_workers": 0,
    }

    def batches() -> None:
        data = ImageShards(train="00000.tar", batch_size=1, max_broken=1.0, **options)
        data.prepare_data()
        data.setup("fit")
        next(iter(data.loader("train")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder / "cache"))
        read_all(lambda: list(iterate_shard(str(path))), lambda: shard_counts([str(path)], sizes=None), batches)


# -- Configurations ---------------------------------------------------------------------------------------------------

SMOKE = shipped("tove/smoke").read_bytes()
LEAVES = 60


@FUZZ
@given(files(SMOKE, b"a: &x {b: [*x, 1]}\n<<: *x", b"model: !!python/object/apply:os.system ['true']\n"))
def test_configuration_files(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    read_all(lambda: check_config_file(path), lambda: version_of(path))
    with contextlib.suppress(OSError, ValueError):  # which it is said to raise
        value = read_yaml(path)
        read_all(lambda: refuse_strangers(value, path))


@FEW
@given(st.lists(st.tuples(st.integers(0, LEAVES), JSON), min_size=1, max_size=2))
def test_settings_of_a_configuration(folder: Path, changes: list[tuple[int, Any]]) -> None:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(with_edits(yaml.safe_load(SMOKE), changes), allow_unicode=True), encoding="utf-8")
    read_all(lambda: parse_configs([path], [], command="plan"))


@FEW
@given(st.lists(st.tuples(st.integers(0, LEAVES), JSON), min_size=1, max_size=2))
def test_runs_of_strangers(folder: Path, changes: list[tuple[int, Any]]) -> None:
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(a_checkpoint())
    text = yaml.safe_dump(with_edits(yaml.safe_load(SMOKE), changes), allow_unicode=True)
    (run / "config.yaml").write_text(text, encoding="utf-8")
    read_all(lambda: load_run(run))


# -- Checkpoints, weights and stores ----------------------------------------------------------------------------------


def a_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(3), "n": torch.tensor(2)}, "global_step": 3, "callbacks": {}}, buffer)
    return buffer.getvalue()


def an_old_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(3)}, "global_step": 3}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@FUZZ
@given(files(a_checkpoint(), an_old_checkpoint()))
def test_checkpoints(folder: Path, content: bytes) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    read_all(
        lambda: load_checkpoint(path, owner="Test"),
        lambda: checked_checkpoint(path, owner="Test"),
        lambda: newest_checkpoint(path.parent),
        lambda: load_state(path, owner="Test"),
        lambda: state_keys(path),
    )


@FUZZ
@given(files(save({"w": torch.ones(3), "module.v": torch.ones(2, 2)}, {"format": "pt"})))
def test_weights(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    read_all(lambda: load_state(path, owner="Test"), lambda: state_keys(path))


KEY = FeatureKey("expert", "d" * 12, "e" * 12, rows=3, tokens=2, width=2, grid_hw=(1, 2), dtype="int8")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("store")
    write_features(made, KEY, lambda rows: torch.ones(len(rows), 2, 2).split(1), filling=Filling(shard_mb=1))
    return made


@FUZZ
@given(st.data(), st.sampled_from(["card.json", "shard"]))
def test_stores(store: Path, data: st.DataObject, name: str) -> None:
    (shard,) = shards_of(KEY, 3)
    path = store / KEY.name / (shard.name if name == "shard" else name)
    whole = path.read_bytes()

    def read() -> None:
        file = open_features(store, KEY)
        if file is not None:
            file.read(torch.arange(3))

    try:
        path.write_bytes(data.draw(files(whole)))
        read_all(read, lambda: list(verify(store)))
    finally:
        path.write_bytes(whole)
