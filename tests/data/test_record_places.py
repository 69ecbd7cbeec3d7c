"""A broken record is named by its place in the file, once, with what it is and what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import annotation, write_coco, write_json, write_json_lines, write_vqa
from visexpert.data import POPE, VSR, COCOCaptions, LLaVAInstruct, VQAv2
from visexpert.data.faults import FaultLog
from visexpert.data.rows import RowData
from visexpert.data.source import SourceData
from visexpert.errors import DataError


def options(root: Path, **more: Any) -> dict[str, Any]:
    return {"root": str(root), "image_size": 8, "num_workers": 0, "max_broken": 1.0} | more


def reasons(source: SourceData) -> list[str]:
    return [log.last for log in source.fault_logs if len(log)]


def karpathy(split: str, number: int) -> dict[str, Any]:
    name = f"COCO_val2014_{number:012d}.jpg"
    return {"filepath": "val2014", "filename": name, "split": split, "sentences": [{"raw": "a dog"}]}


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("a string", "it is the string 'a string', but must be an object"),
        ({"filename": "x.jpg"}, "it has no 'split'"),
        ({"split": "trian"}, "split is the string 'trian', but must be one of train, restval, val, test"),
    ],
)
def test_an_image_that_is_of_no_part_is_named_by_its_place_and_once(broken: Any, told: str, tmp_path: Path) -> None:
    images = [karpathy(split, number) for number, split in enumerate(["val", "test", "train", "train", "val"])]
    write_json(tmp_path / "dataset_coco.json", {"images": [*images, broken, karpathy("test", 9)]})
    data = COCOCaptions(**options(tmp_path))
    assert [len(data.table(part)) for part in ("train", "val", "test")] == [2, 2, 2]
    (reason,) = reasons(data)
    assert "images[5] of " in reason and told in reason
    alone = COCOCaptions(**options(tmp_path))
    alone.open("test")
    assert len(reasons(alone)) == 1


def test_an_image_of_one_part_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    broken = karpathy("test", 7) | {"sentences": 5}
    images = [karpathy("train", 0), karpathy("val", 1), karpathy("test", 2), broken]
    write_json(tmp_path / "dataset_coco.json", {"images": images})
    data = COCOCaptions(**options(tmp_path))
    data.open("test")
    (reason,) = reasons(data)
    assert "images[3] of " in reason and "sentences is the number 5, but must be a list" in reason


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def test_a_held_out_conversation_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    records = [{"id": str(n), "conversations": talk("a", "b")} for n in range(5)]
    write_json(tmp_path / "talk.json", [*records[:3], {"id": "3"}, records[4]])
    data = LLaVAInstruct(annotations="talk.json", num_val=2, **options(tmp_path))
    assert (len(data.table("train")), len(data.table("val"))) == (3, 1)
    assert "[3] of " in reasons(data)[0] and "it has no 'conversations'" in reasons(data)[0]


def test_lines_count_from_one_and_empty_ones_count(tmp_path: Path) -> None:
    good = {"question_id": 1, "image": "1.jpg", "text": "a cat?", "label": "no"}
    path = write_json_lines(tmp_path / "coco_pope_random.json", [good])
    path.write_text("\n" + path.read_text() + "\n17\n")
    data = POPE(kinds=["random"], **options(tmp_path))
    assert len(data.table("test")) == 1
    assert f"Line 4 of {path} " in reasons(data)[0] and "the number 17" in reasons(data)[0]
    write_json(path, [good, good, None])  # a list where lines are usual
    data = POPE(kinds=["random"], **options(tmp_path))
    data.open("test")
    assert f"[2] of {path} " in reasons(data)[0] and "it is null" in reasons(data)[0]


def vsr(root: Path, **more: Any) -> RowData:
    record = {"image": "1.jpg", "image_link": "http://x/train2017/1.jpg", "caption": "a b", "label": 1, **more}
    write_json_lines(root / "zeroshot" / "test.jsonl", [record])
    return VSR(**options(root, max_broken=0.0))


def pope(root: Path, **more: Any) -> RowData:
    write_json_lines(root / "coco_pope_random.json", [{"image": "1.jpg", "text": "a?", "label": "no", **more}])
    return POPE(kinds=["random"], **options(root, max_broken=0.0))


def official(root: Path, **more: Any) -> RowData:
    path = root / "annotations" / "captions_val2014.json"
    write_coco(path, [{"id": 1, "file_name": "1.jpg", **more}], [(1, "a dog")])
    return COCOCaptions(annotations="2014", **options(root, max_broken=0.0))


def vqa(root: Path, **more: Any) -> RowData:
    question = {"image_id": 9, "question": "what ?", "question_id": 1}
    write_vqa(root, "val", [question], [annotation(1, 9, ["red"] * 10, "other") | more])
    return VQAv2(**options(root, max_broken=0.0))


def llava(root: Path, **more: Any) -> RowData:
    write_json(root / "talk.json", [{"id": "1", "image": "1.jpg", "conversations": talk("a", "b"), **more}])
    data = LLaVAInstruct(annotations="talk.json", **options(root, max_broken=0.0))
    data.parts = ("train",)
    return data


@pytest.mark.parametrize(
    ("source", "more", "told"),
    [
        (vsr, {"image_link": 5}, "image_link is the number 5, but must be text"),
        (vsr, {"label": [1]}, "label is a list, but must be 0 or 1"),
        (vsr, {"label": True}, "label is true, but must be 0 or 1"),
        (pope, {"image": None}, "image is null, but must be the name of a file"),
        (pope, {"label": None}, "label is null, but must be yes or no"),
        (official, {"id": [1]}, "id is a list, but must be a number or text"),
        (official, {"file_name": 3}, "file_name is the number 3, but must be the name of a file"),
        (vqa, {"image_id": None}, "image_id is null, but must be a whole number"),
        (vqa, {"image_id": "nine"}, "image_id is the string 'nine', but must be a whole number"),
        (vqa, {"question_id": {}}, "question_id is an object, but must be a number or text"),
        (vqa, {"answers": 4}, "answers is the number 4, but must be a list"),
        (vqa, {"answers": ["red"]}, "a human answer is the string 'red', but must be an object"),
        (llava, {"conversations": "hi"}, "conversations is the string 'hi', but must be a list"),
        (llava, {"conversations": [5]}, "a message is the number 5, but must be an object"),
        (llava, {"conversations": [{"from": "human"}]}, "a message has no 'value'"),
        (llava, {"conversations": [{"from": "system", "value": "x"}]}, "'system', but must be one of human, user, gpt"),
        (llava, {"conversations": [{"from": "human", "value": 7}]}, "the number 7, but must be text"),
        (llava, {"image": ["a.jpg"]}, "image is a list, but must be the name of a file"),
    ],
)
def test_a_reason_says_what_there_is_and_what_must_be(
    source: Any, more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    data = source(tmp_path, **more)
    with pytest.raises(DataError) as error:
        data.open(data.parts[-1])
    message = str(error.value)
    assert told in message
    assert not any(word in message for word in ("None", "indices", "subscriptable", "object has no", "unhashable"))


def test_null_is_called_null_where_an_image_is_needed(tmp_path: Path) -> None:
    data = llava(tmp_path, image=None, conversations=talk("<image>\nwhat ?", "a dog"))
    with pytest.raises(DataError, match="<image>.*'image' is null"):
        data.open("train")


def test_a_file_of_broken_records_ends_with_the_first_reason_and_their_number(tmp_path: Path) -> None:
    records = [
        {"id": str(n), "conversations": [{"from": "human", "value": "Café"}, {"from": "gpt", "value": "é"}]}
        for n in range(3)
    ]
    path = write_json(tmp_path / "talk.json", [])
    import json

    path.write_bytes(json.dumps(records, ensure_ascii=False).encode("latin-1"))
    data = LLaVAInstruct(annotations="talk.json", **options(tmp_path))
    with pytest.raises(DataError, match=r"none of the 3 records .*train.* first .*\[0\] of .*0xe9"):
        data.open("train")
    log = FaultLog("it", total=9, limit=1.0)
    assert (log.first, log.last) == ("", "")


def test_a_file_of_no_records_says_so(tmp_path: Path) -> None:
    write_json(tmp_path / "talk.json", [])
    data = LLaVAInstruct(annotations="talk.json", **options(tmp_path))
    with pytest.raises(DataError, match="name no images"):
        data.open("train")
