"""Packing against batches worked out by hand, and token boundaries under other tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from visexpert.data.packing import TextPacker, pack
from visexpert.errors import ConfigError, DataError
from visexpert.tabletop.texts import tabletop_tokenizer
from visexpert.types import IGNORE_INDEX, TextItem

X = IGNORE_INDEX


def bpe_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE, whose tokens carry the space before a word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"])
    backend.train_from_iterator(["what colour is the cube ? bluish green", "yes no yes no"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **special)


def test_an_item_is_bos_prompt_answer_eos() -> None:
    tokenizer = tabletop_tokenizer()
    ids, num_prompt = TextPacker(tokenizer).tokenize(TextItem("vqa", "what size is the red cube ?", "small"))
    words = "<bos> what size is the red cube ? small <eos>".split()
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == words
    assert num_prompt == 8


def test_an_item_without_prompt_starts_with_its_answer() -> None:
    ids, num_prompt = TextPacker(tabletop_tokenizer()).tokenize(TextItem("objects", "", "a red cube"))
    assert len(ids) == 5 and num_prompt == 1


def test_rows_are_packed_as_worked_out_by_hand() -> None:
    rows = [
        [([1, 5, 6, 7, 2], 3), ([1, 8, 2], 1)],
        [],
        [([1, 9, 2], 2)],
    ]
    batch = pack(rows, 0)
    assert batch.ids_BN.tolist() == [[1, 5, 6, 7, 2, 1, 8, 2], [0] * 8, [1, 9, 2, 0, 0, 0, 0, 0]]
    assert batch.labels_BN.tolist() == [[X, X, X, 7, 2, X, 8, 2], [X] * 8, [X, X, 2, X, X, X, X, X]]
    assert batch.segments_BN.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [0] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.positions_BN.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0] * 8, [0, 1, 2, 0, 0, 0, 0, 0]]


def test_rows_without_any_text_give_one_column_of_padding() -> None:
    batch = pack([[], []], 7)
    assert batch.ids_BN.tolist() == [[7], [7]]
    assert batch.segments_BN.tolist() == [[0], [0]]


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_is_an_error_that_names_the_item(answer: str) -> None:
    with pytest.raises(DataError, match="prompt='a picture of'.*is empty"):
        TextPacker(tabletop_tokenizer()).tokenize(TextItem("caption", "a picture of", answer))


def test_a_long_answer_is_cut_and_then_has_no_end() -> None:
    packer = TextPacker(tabletop_tokenizer(), max_tokens=5)
    ids, num_prompt = packer.tokenize(TextItem("caption", "image", "a red cube and a blue sphere"))
    assert packer.tokenizer.decode(ids) == "<bos> image a red cube"
    assert num_prompt == 2
    whole, _ = packer.tokenize(TextItem("caption", "image", "red cube"))
    assert packer.tokenizer.decode(whole) == "<bos> image red cube <eos>"


def test_a_prompt_that_leaves_no_room_is_an_error() -> None:
    packer = TextPacker(tabletop_tokenizer(), max_tokens=4)
    with pytest.raises(DataError, match="takes 5 of max_tokens=4"):
        packer.tokenize(TextItem("vqa", "is there a cube", "yes"))


def test_sub_word_tokens_keep_the_space_before_the_answer() -> None:
    tokenizer = bpe_tokenizer()
    item = TextItem("vqa", "what colour is the cube ?", "bluish green")
    ids, num_prompt = TextPacker(tokenizer).tokenize(item)
    assert tokenizer.decode(ids[1:num_prompt]) == "what colour is the cube ?"
    assert tokenizer.decode(ids[num_prompt:]) == " bluish green<end>"
    assert ids[0] == ids[-1] == tokenizer.eos_token_id  # no <bos> of its own


def test_padding_falls_back_on_the_end_token() -> None:
    assert TextPacker(bpe_tokenizer()).pad_id == TextPacker(bpe_tokenizer()).eos_id
    assert TextPacker(bpe_tokenizer(pad_token="<pad>")).pad_id != TextPacker(bpe_tokenizer()).eos_id


def test_many_items_give_what_single_ones_give() -> None:
    packer = TextPacker(tabletop_tokenizer())
    items = [TextItem("vqa", "is there a cube ?", answer) for answer in ("yes", "no", "yes")]
    together = packer.tokenize_all(items)
    for item, (ids, num_prompt) in zip(items, together, strict=True):
        alone, alone_prompt = packer.tokenize(item)
        assert ids.tolist() == alone.tolist() and num_prompt == alone_prompt


def test_a_tokenizer_without_an_end_cannot_pack() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        TextPacker(tokenizer)


def test_max_tokens_has_room_for_an_answer() -> None:
    with pytest.raises(ConfigError, match="max_tokens is 2"):
        TextPacker(tabletop_tokenizer(), max_tokens=2)
