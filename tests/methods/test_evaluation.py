"""From predicted tokens to scores, by hand."""

from __future__ import annotations

import pytest
import torch

from visexpert.data import TextPacker, pack
from visexpert.data.tabletop.tokenizer import tabletop_tokenizer
from visexpert.methods.evaluation import Evaluator, decode, item_of_supervised
from visexpert.types import Batch, TextItem

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
        (TextItem("vqa", "what colour is the cube ?", "red", family="colour"),
         TextItem("vqa", "what shape is on the left side ?", "cube", family="shape")),
        (TextItem("pope", "is there a red cube in the image ?", "yes", family="random"),),
    )  # fmt: skip
    text = pack([packer.tokenise_all(row) for row in items], 0)
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
