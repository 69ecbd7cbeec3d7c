"""The word-level tokenizer knows every word of every text, and nothing else."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tests.tabletop.some_graphs import random_graphs
from visexpert.data.packing import TextPacker
from visexpert.tabletop.pool import generate_pools
from visexpert.tabletop.tokenizer import tabletop_tokenizer, vocabulary


def test_special_tokens_have_fixed_ids() -> None:
    tokenizer = tabletop_tokenizer()
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))


def test_words_are_lower_cased_and_split_at_space_and_punctuation() -> None:
    tokenizer = tabletop_tokenizer()
    ids = tokenizer("Is there a RED  cube?", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["is", "there", "a", "red", "cube", "?"]
    assert tokenizer.decode(ids) == "is there a red cube ?"


def test_unknown_words_become_unk_and_the_image_token_stays_whole() -> None:
    tokenizer = tabletop_tokenizer()
    ids = tokenizer("<image> a zebra", add_special_tokens=False)["input_ids"]
    assert ids == [4, tokenizer.convert_tokens_to_ids("a"), 3]


def test_every_text_is_known_and_at_most_26_tokens_long() -> None:
    pools = generate_pools(random_graphs(300, seed=0), split="train", seed=0, progress=False)
    packer = TextPacker(tabletop_tokenizer())
    items = [item for pool in pools for item in pool]
    tokenized = packer.tokenize_all(items)
    assert max(len(ids) for ids, _ in tokenized) <= 26
    assert not any((ids == 3).any() for ids, _ in tokenized)
    used = {int(token) for ids, _ in tokenized for token in ids}
    assert set(range(len(vocabulary()))) - used == {0, 3, 4}  # closed: no word is there in vain


def test_it_survives_saving_and_loading(tmp_path: Path) -> None:
    tokenizer = tabletop_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "which side is the orange cylinder on ?"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
