"""NoCaps, VQA v2, VSR and POPE from files in their official forms, against what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import (
    annotation,
    close_to,
    statement,
    tokenizer_folder,
    write_coco,
    write_jpeg,
    write_json,
    write_json_lines,
    write_vqa,
)
from visexpert.data import POPE, VSR, NoCaps, VQAv2
from visexpert.errors import ConfigError, DataError


def options(root: Path, **more: Any) -> dict[str, Any]:
    words = tokenizer_folder(root / "words")
    return {"root": str(root), "tokenizer": words, "image_size": 8, "num_workers": 0, "batch_size": 1} | more


def test_nocaps_has_domains(tmp_path: Path) -> None:
    images = []
    for number, domain in enumerate(("in-domain", "out-domain")):
        name = f"00{number}3ea2087020901.jpg"
        write_jpeg(tmp_path / "val" / name, ("red", "blue")[number])
        images.append(
            {
                "id": number,
                "open_images_id": name[:-4],
                "height": 8,
                "width": 12,
                "file_name": name,
                "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}",
                "license": 0,
                "domain": domain,
                "date_captured": "2018-11-06 11:04:33",
            }
        )
    captions = [(1, "a blue bird"), (0, "a red dog"), (1, "the sky")]
    write_coco(tmp_path / "nocaps_val_4500_captions.json", images, captions)
    data = NoCaps(**options(tmp_path))
    data.prepare_data()
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert [item.family for (item,) in batch.items] == ["in-domain", "out-domain"]
    assert [item.references for (item,) in batch.items] == [("a red dog",), ("a blue bird", "the sky")]
    assert close_to(batch.images_BCHW[1].permute(1, 2, 0), "blue")
    with pytest.raises(ConfigError, match="no training part"):
        data.train_dataloader()


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    for part, images in (("train", (9,)), ("val", (42, 73))):
        for image in images:
            write_jpeg(tmp_path / "coco" / f"{part}2014" / f"COCO_{part}2014_{image:012d}.jpg", "green")
    ask = [(42000, 42, "What colour is it?"), (42001, 42, "Is there a dog?"), (73000, 73, "How many birds?")]
    questions = [{"image_id": image, "question": text, "question_id": number} for number, image, text in ask]
    answers = [
        annotation(73000, 73, ["2"] * 7 + ["3"] * 3, "number"),
        annotation(42000, 42, ["green"] * 9 + ["red"], "other"),
        annotation(42001, 42, ["yes"] * 4 + ["no"] * 6, "yes/no"),
    ]
    write_vqa(tmp_path, "val", questions, answers)
    train = [{"image_id": 9, "question": "What is this?", "question_id": 9000}]
    write_vqa(tmp_path, "train", train, [annotation(9000, 9, ["dog"] * 5 + ["cat"] * 5, "other")])
    return tmp_path


def test_vqa_gathers_the_questions_of_an_image(vqa: Path) -> None:
    data = VQAv2(images=str(vqa / "coco"), prompt="{question} .", **options(vqa))
    data.prepare_data()
    data.setup("test")
    (batch,) = data.test_dataloader()
    first, second = batch.items  # in the order of the annotations
    assert [(item.prompt, item.answer, item.family) for item in first] == [("How many birds? .", "2", "number")]
    assert first[0].references == ("2",) * 7 + ("3",) * 3 and first[0].generate
    assert [(item.answer, item.family) for item in second] == [("green", "other"), ("no", "yes-no")]
    assert batch.text is not None and batch.text.segments_BN.max(1).values.tolist() == [1, 2]


def test_vqa_trains_on_the_commonest_answer_or_on_a_drawn_one(vqa: Path) -> None:
    def answers(**more: Any) -> set[str]:
        data = VQAv2(images=str(vqa / "coco"), **options(vqa, **more))
        loader = data.loader("train")
        found = set()
        for epoch in range(12):
            loader.set_epoch(epoch)
            (batch,) = loader
            assert batch.text is not None and data.tokenizer is not None
            found.add(data.tokenizer.decode(batch.text.labels_BN[0][batch.text.labels_BN[0] >= 0].tolist()))
        return {str(text) for text in found}

    assert answers() == {"dog </s>"}
    assert answers(draw_answers=True) == {"dog </s>", "cat </s>"}


def test_visual_genomes_questions_are_trained_on_as_well(vqa: Path) -> None:
    folder = vqa / "vg"
    for number, place in ((1, "VG_100K"), (2417, "VG_100K_2")):
        write_jpeg(folder / place / f"{number}.jpg", "red")
    (folder / "VG_100K_2").mkdir(exist_ok=True)

    def entry(image: int, number: int, question: str, answer: str) -> dict[str, Any]:
        return {
            "a_objects": [],
            "question": question,
            "image_id": image,
            "qa_id": number,
            "answer": answer,
            "q_objects": [],
        }

    qas = [
        {"id": 1, "qas": [entry(1, 986769, "What colour is the clock?", "Green."), entry(1, 2, "Who?", "A man.")]},
        {"id": 2417, "qas": [entry(2417, 3, "Where is the hat?", "On the left.")]},
    ]
    write_json(folder / "question_answers.json", qas)
    data = VQAv2(images=str(vqa / "coco"), visual_genome=str(folder), **options(vqa))
    data.prepare_data()
    samples = list(data.table("train"))
    assert [sample.image.split("/")[-1] for sample in samples] == [
        "COCO_train2014_000000000009.jpg",
        "1.jpg",
        "2417.jpg",
    ]
    assert [item.answer for item in samples[1].items] == ["green", "a man"]
    assert Path(samples[2].image).is_file()


def test_a_question_without_its_text_is_a_broken_record(vqa: Path) -> None:
    write_vqa(vqa, "val", [], [annotation(1, 42, ["yes"] * 10, "yes/no")])
    with pytest.raises(DataError, match="question 1 is not among the questions"):
        VQAv2(images=str(vqa / "coco"), **options(vqa)).setup("test")


STATEMENTS = [
    statement("000000050403.jpg", "train2017", "The cat is on the mat.", 1, "on"),
    statement("000000401552.jpg", "val2017", "The dog is far away from the cat.", 0, "far away from"),
    statement("000000050403.jpg", "train2017", "The cat is facing the dog.", 0, "facing"),
]


@pytest.mark.parametrize("flat", [True, False])
def test_vsr_knows_categories_and_either_layout_of_images(tmp_path: Path, flat: bool) -> None:
    write_json_lines(tmp_path / "zeroshot" / "test.jsonl", STATEMENTS)
    for record, folder in ((STATEMENTS[0], "train2017"), (STATEMENTS[1], "val2017")):
        write_jpeg(tmp_path / ("images" if flat else folder) / record["image"], "red")
    data = VSR(prompt="true ? {statement}", answers=("true", "false"), **options(tmp_path))
    data.check(["test"])
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert not batch.skipped
    first, second = batch.items
    assert [(item.prompt, item.answer, item.family) for item in first] == [
        ("true ? The cat is on the mat.", "true", "topological"),
        ("true ? The cat is facing the dog.", "false", "orientation"),
    ]
    assert [(item.answer, item.family) for item in second] == [("false", "proximity")]


def test_pope_puts_all_kinds_of_an_image_together(tmp_path: Path) -> None:
    name = "COCO_val2014_000000310196.jpg"
    write_jpeg(tmp_path / "val2014" / name, "blue")
    for number, kind in enumerate(("random", "popular", "adversarial")):
        records = [
            {"question_id": 1, "image": name, "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": name, "text": f"Is there a {kind} in the image?", "label": "no"},
        ][: number + 1]
        write_json_lines(tmp_path / f"coco_pope_{kind}.json", records)
    data = POPE(**options(tmp_path))
    data.prepare_data()
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert [(item.family, item.answer) for item in batch.items[0]] == [
        ("random", "yes"),
        ("popular", "yes"),
        ("popular", "no"),
        ("adversarial", "yes"),
        ("adversarial", "no"),
    ]
    assert batch.items[0][-1].prompt == "Is there a adversarial in the image?"
    assert [item.kind for item in batch.items[0]] == ["pope"] * 5
    chosen = POPE(kinds=["popular"], **options(tmp_path))
    assert [item.family for item in chosen.table("test")[0].items] == ["popular", "popular"]


@pytest.mark.parametrize("prompt", ["what?", "{statement}", "{question} {question}", "{question"])
def test_a_prompt_has_one_place_for_the_question(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(ConfigError, match="{question}"):
        POPE(root=str(tmp_path), prompt=prompt)


def test_an_unknown_kind_of_probe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random, popular, adversarial"):
        POPE(root=str(tmp_path), kinds=["rare"])
