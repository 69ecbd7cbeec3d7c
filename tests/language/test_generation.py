"""Greedy generation: one image at a time or together, and the same as the teacher-forced argmax."""

from __future__ import annotations

import pytest
import torch

from tests.language.helpers import KINDS, NEVER, VOCAB, item, language_model, one_item, vision
from visexpert.data import pack
from visexpert.errors import DataError
from visexpert.types import VisionTokens


@pytest.mark.parametrize("kind", KINDS)
def test_together_equals_one_by_one(kind: str) -> None:
    side, images = language_model(kind), vision(4)
    prompts = [item(length, length)[0] for length in (1, 5, 9, 3)]
    together = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=8)
    for index, prompt in enumerate(prompts):
        alone = VisionTokens(images.tokens_BTD[index : index + 1], images.grid_hw)
        assert side.generate(alone, [prompt], eos_id=NEVER, max_new_tokens=8) == [together[index]]
    assert [len(row) for row in together] == [8] * 4
    assert len({tuple(row) for row in together}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_before_the_end_token_each_row_on_its_own(kind: str) -> None:
    side, images = language_model(kind), vision(3)
    prompts = [item(length, length)[0] for length in (2, 4, 3)]
    free = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=8)
    eos = free[0][3]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert side.generate(images, prompts, eos_id=eos, max_new_tokens=8) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 4, 7])
def test_teacher_forcing_is_right_exactly_where_greedy_decoding_is(kind: str, length: int) -> None:
    """What evaluation relies on: it scores by one packed forward instead of a generation per question."""
    side, images = language_model(kind), vision(1)
    prompt = item(length, length)[0]
    written = side.generate(images, [prompt], eos_id=NEVER, max_new_tokens=6)[0]
    answers = [written]
    for place in (0, 3, 5):  # the same answer with one token wrong: first, inner, last
        wrong = list(written)
        wrong[place] = (wrong[place] + 1) % VOCAB
        answers.append(wrong)
    logits_MV = side(images, pack([[([*prompt, *answer], length) for answer in answers]], 0)).logits_MV
    predicted = logits_MV.argmax(-1).view(len(answers), 6).tolist()
    assert [row == answer for row, answer in zip(predicted, answers, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_end_is_a_predicted_end(kind: str) -> None:
    side, images = language_model(kind), vision(1)
    prompt = item(3, 3)[0]
    free = side.generate(images, [prompt], eos_id=NEVER, max_new_tokens=6)[0]
    place = next(index for index in range(1, 6) if free[index] not in free[:index])
    eos = free[place]
    written = side.generate(images, [prompt], eos_id=eos, max_new_tokens=6)[0]
    assert written == free[:place]
    logits_MV = side(images, one_item([*prompt, *written, eos], 3)).logits_MV
    assert logits_MV.argmax(-1).tolist() == [*written, eos]


def test_a_full_row_does_not_stop_the_others() -> None:
    """Rows end at max_tokens (24) each on its own."""
    side, images = language_model("cross"), vision(3)
    prompts = [item(length, length)[0] for length in (24, 21, 4)]
    together = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=8)
    assert [len(row) for row in together] == [0, 3, 8]
    alone = VisionTokens(images.tokens_BTD[2:], images.grid_hw)
    assert side.generate(alone, prompts[2:], eos_id=NEVER, max_new_tokens=8) == together[2:]


def test_a_prompt_beyond_the_limit_is_refused() -> None:
    with pytest.raises(DataError, match="item of 25 tokens is longer than max_tokens=24"):
        language_model("cross").generate(vision(1), [item(25, 25)[0]], eos_id=NEVER)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_leaves_no_graph(kind: str) -> None:
    side, images = language_model(kind), vision(1)
    tokens_BTD = images.tokens_BTD.requires_grad_()
    side.generate(VisionTokens(tokens_BTD, images.grid_hw), [[1, 4]], eos_id=NEVER, max_new_tokens=2)
    assert tokens_BTD.grad is None and torch.is_grad_enabled()
