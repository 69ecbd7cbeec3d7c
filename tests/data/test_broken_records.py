"""A reader loses the broken record alone and says the true reason."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.formats import (
    annotation,
    jpeg_bytes,
    tokenizer_folder,
    write_coco,
    write_jpeg,
    write_json,
    write_json_lines,
    write_vqa,
)
from visexpert.data import CC3M, POPE, COCOCaptions, LLaVAInstruct, NoCaps, VQAv2
from visexpert.data.annotations import BrokenRecordError, checked, read_json_lines, read_json_list
from visexpert.data.faults import FaultLog
from visexpert.data.rows import RowImages
from visexpert.data.samples import Sample, SampleTable
from visexpert.errors import ConfigError, DataError
from visexpert.types import Skipped

LONE = "\ud83d"


def options(root: Path, **more: Any) -> dict[str, Any]:
    words = tokenizer_folder(root / "words")
    return {"root": str(root), "tokenizer": words, "image_size": 8, "num_workers": 0, "max_broken": 1.0} | more


# -- Files ------------------------------------------------------------------------------------------------------------


def test_lines_end_at_line_breaks_alone(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    lines = [{"text": "one\u2028two"}, {"text": "three\u0085four\x0bfive"}]
    file.write_bytes("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode())
    assert read_json_lines(file) == lines


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for content, read in (('{"a": 1}\n', read_json_lines), ('[{"a": 1}]', read_json_list)):
        (tmp_path / "file").write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(tmp_path / "file") == [{"a": 1}]
    (tmp_path / "file").write_text("[]", encoding="utf-16")
    with pytest.raises(DataError, match="are UTF-16; save them as UTF-8"):
        read_json_list(tmp_path / "file")


def test_a_list_and_lines_are_read_where_the_other_is_expected(tmp_path: Path) -> None:
    records = [{"a": 1}, {"a": "[2]"}]
    assert read_json_lines(write_json(tmp_path / "list.json", records)) == records
    assert read_json_list(write_json_lines(tmp_path / "lines.jsonl", records)) == records
    (tmp_path / "one.json").write_text(json.dumps({"images": records}, indent=1))
    assert read_json_list(tmp_path / "one.json", "images") == records


def test_latin_1_costs_the_records_that_are_no_utf_8(tmp_path: Path) -> None:
    records = [{"question_id": n, "image": f"{n}.jpg", "text": text, "label": "yes"} for n, text in enumerate("aé")]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "coco_pope_random.json").write_bytes(lines.encode("latin-1"))
    data = POPE(kinds=["random"], **options(tmp_path))
    assert [item.prompt for sample in data.table("test") for item in sample.items] == ["a"]
    assert "byte 0xe9" in data.fault_logs[0].last


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert checked("\U0001f600", name="it") == "\U0001f600"
    with pytest.raises(BrokenRecordError, match=r"U\+D83D .*character 1"):
        checked(f"a{LONE}b", name="it")


# -- Records ----------------------------------------------------------------------------------------------------------


def test_an_empty_sentence_costs_no_other(tmp_path: Path) -> None:
    sentences = [{"raw": "a dog"}, {"raw": " "}, {"raw": f"a {LONE}"}, {"raw": "a cat"}]
    image = {"filepath": "val2014", "filename": "1.jpg", "split": "test", "sentences": sentences}
    write_json(tmp_path / "dataset_coco.json", {"images": [image, image | {"sentences": sentences[1:3]}]})
    data = COCOCaptions(**options(tmp_path))
    assert [item.references for sample in data.table("test") for item in sample.items] == [("a dog", "a cat")]
    assert (len(data.fault_logs[0]), data.fault_logs[0].parts) == (1, 2)


def test_an_answer_that_is_no_text_costs_no_other(tmp_path: Path) -> None:
    question = {"image_id": 9, "question": "what ?", "question_id": 1}
    answers = annotation(1, 9, ["red"] * 8 + ["", "blue"], "other")
    answers["answers"][0]["answer"] = None
    write_vqa(tmp_path, "val", [question], [answers])
    data = VQAv2(**options(tmp_path))
    ((item,),) = [sample.items for sample in data.table("test")]
    assert item.references == ("red",) * 7 + ("", "blue") and "a human answer is null" in data.fault_logs[0].last


def test_a_question_of_visual_genome_costs_no_other(tmp_path: Path) -> None:
    write_vqa(tmp_path, "train", [], [])
    qas = [{"question": "what ?", "answer": answer} for answer in ("A dog.", ".", "")]
    write_json(tmp_path / "question_answers.json", [{"id": 1, "qas": qas}, {"id": 2, "qas": []}])
    data = VQAv2(visual_genome=str(tmp_path), **options(tmp_path))
    assert [item.answer for sample in data.table("train") for item in sample.items] == ["a dog"]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def test_a_turn_without_an_answer_costs_no_other(tmp_path: Path) -> None:
    records = [{"id": "1", "conversations": talk("a", " ", "b", "two", "c", "three")}]
    write_json(tmp_path / "talk.json", records)
    data = LLaVAInstruct(annotations="talk.json", **options(tmp_path))
    ((item,),) = [sample.items for sample in data.table("train")]
    assert (item.prompt, item.answer, item.history) == ("c", "three", (("b", "two"),))
    assert "the answer of turn 1 is empty" in data.fault_logs[0].last


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"video": "1.mp4", "conversations": talk("what ?", "a dog")}, "it has 'video'"),
        ({"image_path": "1.jpg", "conversations": talk("what ?", "a dog")}, "it has 'image_path'"),
        ({"conversations": talk("<image>\nwhat ?", "a dog")}, "<image>"),
        ({"image": None, "conversations": talk("<video>\nwhat ?", "a dog")}, "<video>"),
    ],
)
def test_an_image_that_cannot_be_found_by_key_is_no_text_alone(
    record: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = {"id": "2", "model": "", "conversations": talk("hi", "hello")}
    write_json(tmp_path / "talk.json", [{"id": "1", **record}, fine])
    data = LLaVAInstruct(annotations="talk.json", **options(tmp_path))
    assert [sample.key for sample in data.table("train")] == ["talk.json:2"]
    reason = data.fault_logs[0].last
    assert told in reason and all(repr(key) in reason for key in record)


def test_an_image_that_is_listed_twice_is_scored_once(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": None} for n in (1, 2, 1)]
    write_coco(tmp_path / "nocaps_val_4500_captions.json", images, [(1, "a dog"), (2, "a cat")])
    data = NoCaps(**options(tmp_path))
    items = [item for sample in data.table("test") for item in sample.items]
    assert [(item.answer, item.family) for item in items] == [("a dog", ""), ("a cat", "")]
    assert "image 1 is listed" in data.fault_logs[0].last
    entry = {"filepath": "val2014", "filename": "1.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}
    write_json(tmp_path / "dataset_coco.json", {"images": [entry, entry]})
    assert len(COCOCaptions(**options(tmp_path)).table("test")) == 1


def test_a_question_that_is_answered_twice_is_scored_once(tmp_path: Path) -> None:
    question = {"image_id": 9, "question": "what ?", "question_id": 1}
    answers = annotation(1, 9, ["red"] * 10, "other") | {"answer_type": None}
    write_vqa(tmp_path, "val", [question], [answers, answers])
    ((item,),) = [sample.items for sample in VQAv2(**options(tmp_path)).table("test")]
    assert item.family == ""


@pytest.mark.parametrize(("num_val", "train"), [(1, 1), (2, None), (5, None)])
def test_held_out_conversations_are_not_trained_on(num_val: int, train: int | None, tmp_path: Path) -> None:
    write_json(tmp_path / "talk.json", [{"id": str(n), "conversations": talk("a", "b")} for n in range(2)])
    data = LLaVAInstruct(annotations="talk.json", num_val=num_val, **options(tmp_path))
    if train is None:
        with pytest.raises(ConfigError, match=f"num_val is {num_val}, but .* has 2 conversations.* at most 1"):
            data.table("train")
        return
    keys = {part: {sample.key for sample in data.table(part)} for part in ("train", "val")}
    assert keys == {"train": {"talk.json:0"}, "val": {"talk.json:1"}}


def test_images_of_validation_are_not_trained_on_by_way_of_visual_genome(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_vqa(tmp_path, "train", [], [])
    qas = [{"question": "what ?", "answer": "A dog."}]
    write_json(tmp_path / "question_answers.json", [{"id": number, "qas": qas} for number in (1, 2, 3)])

    def trained() -> list[str]:
        return [Path(s.image).stem for s in VQAv2(visual_genome=str(tmp_path), **options(tmp_path)).table("train")]

    assert trained() == ["1", "2", "3"] and "image_data.json" in caplog.text
    write_vqa(tmp_path, "val", [{"image_id": 77, "question": "what ?", "question_id": 1}], [])
    known = [{"image_id": 1, "coco_id": None}, {"image_id": 2, "coco_id": 77}, {"image_id": 3, "coco_id": 78}]
    write_json(tmp_path / "image_data.json", known)
    assert trained() == ["1", "3"]


# -- Shards -----------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], *, mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))


def captions_of(tmp_path: Path, members: Sequence[tuple[str, bytes]], *, mode: str = "w") -> tuple[list[str], str]:
    """Captions that are read of a shard, and all reasons why others are not."""
    write_tar(tmp_path / "0.tar", members, mode=mode)
    data = CC3M(train="0.tar", val="0.tar", **options(tmp_path))
    data.setup("validate")
    batches = list(data.val_dataloader())
    reasons = "\n".join(fault.reason for batch in batches for fault in batch.skipped)
    return [item.answer for batch in batches for row in batch.items for item in row], reasons


IMAGE = jpeg_bytes("red")
GOOD = [("a.jpg", IMAGE), ("a.txt", b"one"), ("z.jpg", IMAGE), ("z.txt", b"two")]


def test_a_compressed_shard(tmp_path: Path) -> None:
    assert captions_of(tmp_path, GOOD, mode="w:gz") == (["one", "two"], "")


def test_every_listed_format_may_lie_in_a_shard(tmp_path: Path) -> None:
    with io.BytesIO() as buffer:
        Image.new("RGB", (8, 8), "red").save(buffer, format="BMP")
        captions, reasons = captions_of(tmp_path, [("b.BMP", buffer.getvalue()), ("b.txt", b"bitmap"), *GOOD])
    assert captions == ["bitmap", "one", "two"] and not reasons


def test_members_of_a_record_that_lie_apart(tmp_path: Path) -> None:
    captions, reasons = captions_of(tmp_path, [GOOD[0], GOOD[2], GOOD[1], GOOD[3], ("m.jpg", IMAGE), ("m.txt", b"m")])
    assert captions == ["m"]
    assert "has no caption (.txt, .json), only .jpg;" in reasons
    assert "has no image (.jpg, .jpeg, .png, .webp, " in reasons and "), only .txt" in reasons


def test_a_member_that_is_there_twice(tmp_path: Path) -> None:
    captions, reasons = captions_of(tmp_path, [GOOD[0], GOOD[0], *GOOD[1:]])
    assert captions == ["two"] and "several members a.jpg" in reasons


def test_dots_in_names_and_other_members(tmp_path: Path) -> None:
    members = [("d.v2.JPG", IMAGE), ("d.v2.txt", b"dotted"), ("e.json", b'{"caption": "j"}'), ("e.jpg", IMAGE)]
    members += [("f.1.jpg", IMAGE), ("f.1.txt", b"x"), ("f.2.jpg", IMAGE), ("f.2.txt", b"y"), ("__meta__.json", b"{}")]
    members += [("__k.jpg", IMAGE), ("__k.txt", b"key")]
    captions, reasons = captions_of(tmp_path, [*members, *GOOD])
    assert captions == ["dotted", "j", "key", "one", "two"]
    assert "may be its image (.1.jpg, .1.txt, .2.jpg, .2.txt)" in reasons


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (("b.json", b'{"caption": null}'), "The caption of the record .*/b is None, but must be text"),
        (("b.json", b'{"caption": ["x"]}'), r"is \['x'\], but must be text"),
        (("b.json", b'{"caption": NaN}'), "is nan, but must be text"),
        (("b.json", b"[]"), r"no readable caption in its \.json"),
        (("b.txt", b"caf\xe9"), r"no readable caption in its \.txt"),
        (("b.txt", b" "), "has an empty caption"),
        (("b.json", b'{"caption": "\\ud83d"}'), r"U\+D83D stands alone"),
    ],
)
def test_a_caption_that_is_no_text(member: tuple[str, bytes], told: str, tmp_path: Path) -> None:
    captions, reasons = captions_of(tmp_path, [("b.jpg", IMAGE), member, *GOOD])
    assert captions == ["one", "two"] and re.search(told, reasons)


@pytest.mark.parametrize(
    ("said", "captions", "told"), [(1, ["one"], "more than the 1 records"), (3, ["one", "two"], "ends before record 2")]
)
def test_numbers_that_disagree_with_the_shard(said: int, captions: list[str], told: str, tmp_path: Path) -> None:
    write_json(tmp_path / "sizes.json", {"0.tar": said})
    read, reasons = captions_of(tmp_path, GOOD)
    assert read == captions and told in reasons


# -- Names ------------------------------------------------------------------------------------------------------------


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    """As os.listdir gives them: they are read, listed once, and have an identity."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    write_jpeg(tmp_path / name, "red")
    data = COCOCaptions(**options(tmp_path))
    images = RowImages(
        SampleTable([Sample(name, str(tmp_path / name), ())]), data.settings.reader(), source="it", changing=False
    )
    assert len(images.fingerprint) == 16 and int(images.read([0])[0, 0].max()) >= 200
    for _ in range(2):
        log = FaultLog("it", total=9, limit=1.0, file=tmp_path / "skipped.jsonl")
        log.add([Skipped(name, "broken\u2028"), Skipped("é", "broken")])
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["key"] for line in lines if line] == [name, "é"]
    assert "é" in lines[1]


def test_a_message_has_no_address_in_it(tmp_path: Path) -> None:
    captions, reasons = captions_of(tmp_path, [("b.jpg", b"no image"), ("b.txt", b"x"), *GOOD])
    assert captions == ["one", "two"] and "/b" in reasons and "0x" not in reasons and "BytesIO" not in reasons


def test_as_many_images_are_looked_for_as_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from visexpert.commands.data import findings

    sample = NoCaps.looked_for
    number = sample + 1
    (tmp_path / "val").mkdir()
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(number)]
    write_coco(tmp_path / "nocaps_val_4500_captions.json", images, [(n, "a dog") for n in range(number)])
    (*_, (_, line)) = findings(NoCaps(**options(tmp_path)), ["test"], images="sample")
    assert f"{number} rows; images of {sample} looked for, {sample} not there" in line
    data = NoCaps(**options(tmp_path))
    data.table("test")
    places = np.array([n * number // sample for n in range(sample)])
    assert places[0] == 0 and np.diff(places).max() <= 2
