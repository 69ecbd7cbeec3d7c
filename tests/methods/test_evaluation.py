"""From predicted tokens to scores, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from visexpert.data import TextPacker, pack
from visexpert.language import Decoding, LanguageModel, Predictions
from visexpert.methods.evaluation import Evaluator, decode, item_of_supervised
from visexpert.tabletop.texts import tabletop_tokenizer
from visexpert.types import Batch, TextBatch, TextItem, VisionTokens

TOKENIZER = tabletop_tokenizer()


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


def test_each_supervised_token_knows_its_image_and_item() -> None:
    text = pack([[([1, 5, 6, 2], 2), ([1, 7, 2], 1)], [([1, 8, 9, 4, 2], 4)]], 0)
    image_M, item_M = item_of_supervised(text)
    assert image_M.tolist() == [0, 0, 0, 0, 1]
    assert item_M.tolist() == [0, 0, 1, 1, 0]


def test_words_end_at_the_end_token() -> None:
    eos = TOKENIZER.eos_token_id
    assert decode([*ids("red cube"), eos, *ids("blue")], TOKENIZER) == "red cube"
    assert decode(ids("red cube"), TOKENIZER) == "red cube"
    assert decode([eos], TOKENIZER) == ""


def test_accuracies_of_hand_written_predictions() -> None:
    packer = TextPacker(TOKENIZER)
    items = (
        (
            TextItem("vqa", "what colour is the cube ?", "red", family="colour"),
            TextItem("vqa", "what shape is on the left side ?", "cube", family="shape"),
        ),
        (TextItem("pope", "is there a red cube in the image ?", "yes", family="random"),),
    )
    text = pack([packer.tokenize_all(row) for row in items], 0)
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.arange(2), "test", text=text, items=items)
    eos = TOKENIZER.eos_token_id
    predicted_M = torch.tensor([*ids("red"), eos, *ids("sphere"), eos, *ids("no"), eos])
    evaluator = Evaluator(captions=0)
    nll_M = torch.tensor([1.0, 0.0, 3.0, 0.0, 5.0, 1.0])
    evaluator.update_text(batch, predicted_M=predicted_M, nll_M=nll_M, tokenizer=TOKENIZER)
    scores = evaluator.compute()
    assert scores["vqa/family/colour"] > 0 and scores["vqa/family/shape"] == 0
    assert scores["vqa/accuracy"] == pytest.approx(scores["vqa/family/colour"] / 2)
    assert scores["pope/accuracy"] == 0
    assert scores["nll/kind/vqa"] == pytest.approx(1.0) and scores["nll/kind/pope"] == pytest.approx(3.0)
    assert scores["nll/nll"] == pytest.approx(10 / 6)


class Parrot(LanguageModel):
    """Writes what it was told to for an image and a prompt; an image's token tells which it is."""

    def __init__(self, says: dict[tuple[int, str], str]) -> None:
        super().__init__(width=1)
        self.says = says
        self.calls: list[int] = []

    def load_weights(self) -> None: ...

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        raise NotImplementedError

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        self.calls.append(len(prompts))
        images = vision.tokens_BTD[:, 0, 0].int().tolist()
        asked = [str(TOKENIZER.decode(list(prompt), skip_special_tokens=True)) for prompt in prompts]
        return [ids(self.says[key]) for key in zip(images, asked, strict=True)]


def batch_of(*rows: tuple[TextItem, ...], source: str = "") -> tuple[Batch, VisionTokens]:
    packer = TextPacker(TOKENIZER)
    text = pack([packer.tokenize_all(row) for row in rows], 0)
    number = torch.arange(len(rows))
    prompts = tuple(tuple(tuple(packer.prompt(item.prompt)) for item in row) for row in rows)
    batch = Batch(
        torch.zeros(len(rows), 3, 4, 4), number, "test", text=text, items=rows, prompts=prompts, source=source
    )
    return batch, VisionTokens(number.float()[:, None, None], (1, 1))


def scored(evaluator: Evaluator, batch: Batch, vision: VisionTokens, language: Parrot) -> None:
    """As Method.score does, with "red" predicted everywhere."""
    assert batch.text is not None
    wanted_M = batch.text.labels_BN[batch.text.labels_BN >= 0]
    red = torch.full_like(wanted_M, ids("red")[0])
    predicted_M = torch.where(wanted_M == TOKENIZER.eos_token_id, wanted_M, red)
    evaluator.update_text(batch, predicted_M=predicted_M, nll_M=torch.ones(len(wanted_M)), tokenizer=TOKENIZER)
    evaluator.write_answers(batch, vision, language, TOKENIZER)
    evaluator.generate_captions(batch, vision, language, TOKENIZER)


QUESTION = TextItem("vqa", "what colour is the cube ?", "blue", "other", ("blue",) * 2 + ("green",) * 8, generate=True)
PROBE = TextItem("pope", "is there a cube ?", "yes", "random", generate=True)
WORD = TextItem("vqa", "what shape is the object ?", "cube", "shape")


def test_answers_are_written_and_held_against_all_references() -> None:
    batch, vision = batch_of((WORD, QUESTION), (QUESTION, PROBE))
    says = {
        (0, "what colour is the cube ?"): "blue",
        (1, "what colour is the cube ?"): "green",
        (1, "is there a cube ?"): "no",
    }
    evaluator = Evaluator(captions=5)
    language = Parrot(says)
    scored(evaluator, batch, vision, language)
    scores = evaluator.compute()
    # Two of ten said blue: mean over leaving one out of min(matches / 3, 1) is (8 * 2/3 + 2 * 1/3) / 10 = 0.6.
    assert scores["vqa/family/other"] == pytest.approx((0.6 + 1.0) / 2)
    assert scores["vqa/family/shape"] == 0  # judged token by token: "red"
    assert scores["pope/accuracy"] == 0 and scores["pope/unparsable"] == 0
    assert language.calls == [3]


def test_in_validation_nothing_is_written() -> None:
    batch, vision = batch_of((QUESTION,), (PROBE,))
    evaluator = Evaluator(captions=0)
    language = Parrot({})
    scored(evaluator, batch, vision, language)
    assert language.calls == [] and evaluator.compute()["vqa/accuracy"] == 0


def test_captions_of_real_data_need_no_scene_graph() -> None:
    items = [
        TextItem("caption", "describe", text, family, (text,), generate=True)
        for text, family in (("a red cube", "near"), ("a blue sphere", "far"), ("a cube left of a sphere", "far"))
    ]
    batch, vision = batch_of(*((item,) for item in items))
    says = {(image, "describe"): item.answer for image, item in enumerate(items)}
    evaluator = Evaluator(captions=10, meteor=False)
    scored(evaluator, batch, vision, Parrot(says))
    scores = evaluator.compute()
    assert scores["caption/cider"] == pytest.approx(10, rel=0.3) and scores["caption/bleu-1"] == pytest.approx(1)
    assert "caption/family/far/cider" in scores and not any("accuracy" in name for name in scores)


def test_sources_have_scores_and_quotas_of_their_own() -> None:
    caption = TextItem("caption", "is there a cube ?", "a red cube", generate=True)
    evaluator = Evaluator(captions=2, meteor=False)
    language = Parrot({(image, "is there a cube ?"): "a red cube" for image in range(3)})
    for source in ("coco", "nocaps"):
        batch, vision = batch_of((caption,), (caption,), (caption,), source=source)
        scored(evaluator, batch, vision, language)
    batch, vision = batch_of((PROBE,), source="pope")
    scored(evaluator, batch, vision, Parrot({(0, "is there a cube ?"): "yes"}))
    scores = evaluator.compute()
    assert language.calls == [2, 2]
    assert scores["coco/caption/bleu-1"] == scores["nocaps/caption/bleu-1"] == pytest.approx(1)
    assert scores["pope/pope/accuracy"] == 1 and scores["pope/pope/random/f1"] == 1
    assert {name.split("/")[0] for name in scores} == {"coco", "nocaps", "pope"}


def test_many_questions_of_an_image_are_written_in_parts() -> None:
    batch, vision = batch_of((PROBE,) * 150)
    language = Parrot({(0, "is there a cube ?"): "yes"})
    evaluator = Evaluator(captions=1)
    scored(evaluator, batch, vision, language)
    assert language.calls == [64, 64, 22] and evaluator.compute()["pope/accuracy"] == 1


@pytest.mark.parametrize(("quota", "images"), [(None, 3), (2, 2), (10, 3)])
def test_scores_of_written_text_say_what_they_stand_on(quota: int | None, images: int) -> None:
    caption = TextItem("caption", "describe", "a red cube", generate=True)
    batch, vision = batch_of((caption,), (caption, QUESTION), (caption,))
    says = {(image, "describe"): "a red cube" for image in range(3)}
    evaluator = Evaluator(captions=quota, meteor=False)
    scored(evaluator, batch, vision, Parrot({**says, (1, "what colour is the cube ?"): "blue"}))
    scores = evaluator.compute()
    assert (scores["caption/images"], scores["caption/images_of"]) == (images, 3)
    assert (scores["vqa/answers"], scores["vqa/answers_of"]) == (1, 1)


def test_answers_that_are_not_written_are_counted_as_such() -> None:
    batch, vision = batch_of((QUESTION, WORD), (QUESTION, QUESTION))
    evaluator = Evaluator(captions=0)
    scored(evaluator, batch, vision, Parrot({}))
    scores = evaluator.compute()
    assert (scores["vqa/answers"], scores["vqa/answers_of"]) == (0, 3)
    assert "caption/images" not in scores and "pope/answers" not in scores
