"""What a language model is given is checked before it reads, in one sentence and without waiting for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.language.helpers import KINDS, VOCAB, WIDTH, language_model, vision
from visexpert.data import pack
from visexpert.errors import ConfigError, DataError, UserError
from visexpert.language import BertDecoder, LanguageModel
from visexpert.types import IMAGE_TOKEN, TextBatch

SIDES = (*KINDS, "bert")


def side_of(kind: str) -> LanguageModel:
    if kind != "bert":
        return language_model(kind)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertDecoder(config={"model_type": "bert", "vocab_size": VOCAB, **sizes}).eval()


def text(*ids: int) -> TextBatch:
    return pack([[([1, *ids], 1)]], 0)


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("given", [(None, text(5)), (vision(1), None), (torch.zeros(1, 6, WIDTH), text(5))])
def test_something_else_than_vision_and_text_is_named(kind: str, given: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        side_of(kind)(*given)
    assert any(f"{name} is" in str(error.value) for name in ("vision", "text"))
    assert any(word in str(error.value) for word in ("None", "Tensor"))


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_named(kind: str, wrong: int) -> None:
    side = side_of(kind)
    assert side.vocab_size == VOCAB
    inside = side(vision(1), text(5, VOCAB - 1)).logits_MV
    assert inside.shape == (2, VOCAB) and inside.isfinite().all()
    for read in (
        lambda: side(vision(1), text(5, wrong)),
        lambda: side(vision(1), replace(text(5, 6), labels_BN=torch.tensor([[-100, 5, wrong]]))),
        lambda: side.generate(vision(1), [[1, wrong]], eos_id=0),
    ):
        with pytest.raises(DataError) as error:
            read()
        assert f" {wrong}," in str(error.value) and f"0 to {VOCAB - 1}" in str(error.value)


def test_markers_of_images_and_ignored_labels_are_no_ids() -> None:
    marked = pack([[([1, IMAGE_TOKEN, 7], 2)]], 0)
    assert (marked.facts.lowest, marked.facts.highest) == (0, 7)
    assert language_model("prefix")(vision(1), marked).logits_MV.shape == (1, VOCAB)


@pytest.mark.parametrize("kind", SIDES)
def test_tokens_of_another_width_or_number_are_named(kind: str) -> None:
    wide = replace(vision(1), tokens_BTD=torch.zeros(1, 6, WIDTH + 1))
    side = side_of(kind)
    cases = ((wide, text(5), f"{WIDTH + 1}"), (vision(2), text(5), "2 images"))
    for tokens, words, part in cases:
        with pytest.raises(DataError) as error:
            side(tokens, words)
        assert part in str(error.value)
    with pytest.raises(DataError):
        side.generate(wide, [[1, 5]], eos_id=0)


@pytest.mark.parametrize("field", ["ids_BN", "labels_BN", "segments_BN", "positions_BN"])
def test_a_field_of_a_text_that_is_no_int64_matrix_is_named(field: str) -> None:
    good = text(5, 6)
    for bad in (getattr(good, field).float(), getattr(good, field)[0], getattr(good, field)[:, :1]):
        with pytest.raises(UserError) as error:
            language_model("cross")(vision(1), replace(good, **{field: bad}))
        assert "(B, N)" in str(error.value)
