"""LLaVA's conversations: turns, text without image, grouping by modality and length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.formats import close_to, tokenizer_folder, write_jpeg, write_json
from visexpert.data import LLaVAInstruct
from visexpert.data.llava import grouped_order
from visexpert.errors import ConfigError, DataError
from visexpert.language import LlavaTemplate
from visexpert.types import IMAGE_TOKEN, Batch


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


RECORDS: list[dict[str, Any]] = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": turns("<image>\nwhat colour is the bus?", "the bus is red .", "how many dogs?", "two ."),
    },
    {"id": "wgByO4Y_0", "model": "", "conversations": turns("describe the sky", "it is blue")},
    {
        "id": "vg/2",
        "image": "vg/VG_100K/2.jpg",
        "conversations": turns("what is there?\n<image>", "a cat"),
    },
]


def llava(root: Path, records: Any = None, **options: Any) -> LLaVAInstruct:
    write_json(root / "llava_v1_5_mix665k.json", RECORDS if records is None else records)
    write_jpeg(root / "coco" / "train2017" / "000000033471.jpg", "red")
    write_jpeg(root / "vg" / "VG_100K" / "2.jpg", "green", size=(8, 16))
    settings: dict[str, Any] = {
        "image_size": 8,
        "batch_size": 3,
        "num_workers": 0,
        "resize": "pad",
        "group_by_length": False,
        "tokenizer": tokenizer_folder(root / "words"),
        "template": partial(LlavaTemplate, style="vicuna_v1"),
    }
    return LLaVAInstruct(root=str(root), **(settings | options))


def by_row(batch: Batch) -> list[int]:
    return batch.index_B.argsort().tolist()


def test_conversations_become_items(tmp_path: Path) -> None:
    data = llava(tmp_path)
    data.prepare_data()
    first, second, third = (sample.items[0] for sample in data.table("train"))
    assert first.history == (("what colour is the bus?", "the bus is red ."),)
    assert (first.prompt, first.answer, first.kind) == ("how many dogs?", "two .", "chat")
    assert (second.history, second.prompt, second.answer) == ((), "describe the sky", "it is blue")
    assert (third.prompt, third.answer) == ("what is there?", "a cat")


def test_a_batch_of_images_and_text_alone(tmp_path: Path) -> None:
    data = llava(tmp_path)
    data.setup("fit")
    (batch,) = data.loader("train")
    first, second, third = by_row(batch)
    assert batch.has_image_B is not None
    assert [bool(batch.has_image_B[row]) for row in (first, second, third)] == [True, False, True]
    assert close_to(batch.images_BCHW[first][:, 2:6].permute(1, 2, 0), "red")
    assert not batch.images_BCHW[second].any()
    assert batch.original_hw_B2 is not None and batch.original_hw_B2[third].tolist() == [16, 8]


def test_every_answer_is_labeled_and_nothing_else(tmp_path: Path) -> None:
    data = llava(tmp_path)
    data.setup("fit")
    (batch,) = data.loader("train")
    assert batch.text is not None and data.tokenizer is not None
    first, second, _ = by_row(batch)
    ids_N, labels_N = batch.text.ids_BN[first], batch.text.labels_BN[first]
    said = data.tokenizer.decode(labels_N[labels_N >= 0].tolist())
    assert said == "the <unk> is red . </s> two . </s>"
    assert torch.equal(labels_N[labels_N >= 0], ids_N[labels_N >= 0])
    assert (ids_N == IMAGE_TOKEN).sum() == 1 and (batch.text.ids_BN[second] == IMAGE_TOKEN).sum() == 0
    starts = (labels_N[1:] >= 0) & (labels_N[:-1] < 0)
    assert int(starts.sum()) == 2  # two answers, apart


def test_the_alignment_stage_leaves_prompts_out(tmp_path: Path) -> None:
    records = [
        {
            "id": "004539375",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": turns("Render a clear and concise summary of the photo.\n<image>", "a red hat"),
        }
    ]
    data = llava(tmp_path, records, template=partial(LlavaTemplate, style="plain"), batch_size=1)
    data.setup("fit")
    (batch,) = data.loader("train")
    assert batch.text is not None and batch.has_image_B is None and data.tokenizer is not None
    bos, image, *answer = batch.text.ids_BN[0].tolist()
    assert (bos, image) == (data.tokenizer.bos_token_id, IMAGE_TOKEN)
    assert data.tokenizer.decode(answer) == "a red hat"
    assert batch.text.labels_BN[0].tolist() == [-100, -100, *answer]


def test_a_conversation_takes_a_template(tmp_path: Path) -> None:
    data = llava(tmp_path, template=None)
    data.setup("fit")
    with pytest.raises(ConfigError, match="set it to visexpert.language.LlavaTemplate"):
        list(data.loader("train"))


def test_the_last_ones_are_held_out(tmp_path: Path) -> None:
    data = llava(tmp_path, num_val=1)
    assert len(data.table("train")) == 2
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.items[0][0].answer == "a cat"
    assert llava(tmp_path).val_dataloader() == []


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (turns("hello"), "do not alternate"),
        (turns("a", "b")[:1] * 2, "do not alternate"),
        (turns("hello", " "), "an answer is empty"),
        ([{"from": "nobody", "value": "x"}], "'nobody', but must be one of human, user, gpt, assistant"),
        ([{"from": "human", "value": None}], "must be text"),
    ],
)
def test_broken_conversations(tmp_path: Path, conversation: list[Any], reason: str) -> None:
    records = [*RECORDS, {"id": "x", "conversations": conversation}]
    with pytest.raises(DataError, match=rf"Record \[3\] of .*{reason}"):
        llava(tmp_path, records).setup("fit")
    assert len(llava(tmp_path, records, max_broken=0.3).table("train")) == 3


def test_an_answer_before_the_first_prompt_is_left_out(tmp_path: Path) -> None:
    said = [{"from": "gpt", "value": "hello"}, *turns("a dog?", "no")]
    data = llava(tmp_path, [{"id": "s", "conversations": said}])
    assert data.table("train")[0].items[0].prompt == "a dog?"


def test_groups_have_one_modality_and_like_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths, has_image = rng.integers(1, 1000, 230), rng.random(230) < 0.7
    group = 8
    order = grouped_order(lengths, has_image, group=group, seed=(0, 1))
    assert sorted(order.tolist()) == list(range(230))
    full = int(has_image.sum()) // group + int((~has_image).sum()) // group
    groups = order[: full * group].reshape(full, group)
    assert all(len(set(has_image[rows].tolist())) == 1 for rows in groups)
    spread = np.mean([np.ptp(lengths[rows]) for rows in groups])
    unsorted = np.mean([np.ptp(lengths[rows]) for rows in rng.permutation(230)[: full * group].reshape(full, group)])
    assert spread < 0.25 * unsorted
    kinds = [bool(has_image[rows[0]]) for rows in groups]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # mixed over the epoch
    assert order.tolist() != grouped_order(lengths, has_image, group=group, seed=(0, 2)).tolist()
    assert order.tolist() == grouped_order(lengths, has_image, group=group, seed=(0, 1)).tolist()


def test_batches_are_grouped(tmp_path: Path) -> None:
    image = "coco/train2017/000000033471.jpg"
    records = [
        {"id": k, "conversations": turns("a", "b " * (k % 9 + 1))} | ({"image": image} if k % 3 else {})
        for k in range(36)
    ]
    loader = llava(tmp_path, records, group_by_length=True, batch_size=4).loader("train")
    modalities: list[set[bool]] = []
    rows: list[int] = []
    for batch in loader:
        rows += batch.index_B.tolist()
        modalities.append({True} if batch.has_image_B is None else set(batch.has_image_B.tolist()))
    assert sorted(rows) == list(range(36))
    assert modalities.count({True}) == 6 and modalities.count({False}) == 3


def test_a_template_is_named_by_its_class(tmp_path: Path, parse_data: Callable[[dict[str, Any]], Any]) -> None:
    template = {"class_path": "visexpert.language.LlavaTemplate", "init_args": {"style": "plain", "max_tokens": 64}}
    words = tokenizer_folder(tmp_path / "words")
    settings = {"root": str(tmp_path), "template": template, "tokenizer": words}
    data = parse_data({"class_path": "visexpert.data.LLaVAInstruct", "init_args": settings})
    assert isinstance(data.packer, LlavaTemplate) and data.packer.style == "plain" and data.packer.max_tokens == 64
