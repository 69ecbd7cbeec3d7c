"""The text pools are deterministic and cached whole or not at all; the tokenizer knows each of their words."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tabletop.some_graphs import random_graphs
from visexpert.data.packing import TextPacker
from visexpert.errors import DataError
from visexpert.tabletop import texts
from visexpert.tabletop.texts import Pools, ensure_pools, generate_pools, tabletop_tokenizer, vocabulary

GRAPHS = random_graphs(40, seed=0)


def ensure(beside: Path, *, seed: int = 0) -> Pools:
    return ensure_pools(GRAPHS, beside=beside, split="train", seed=seed, fingerprint="abc", progress=False)


def test_the_same_split_and_seed_give_the_same_texts() -> None:
    first = generate_pools(GRAPHS, split="train", seed=0, progress=False)
    assert first == generate_pools(GRAPHS, split="train", seed=0, progress=False)
    assert first != generate_pools(GRAPHS, split="test", seed=0, progress=False)
    assert first != generate_pools(GRAPHS, split="train", seed=1, progress=False)


def test_texts_are_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "train-1"
    first = ensure(beside)
    assert [path.name.rsplit(".text-", 1)[0] for path in tmp_path.iterdir()] == ["train-1"]
    monkeypatch.setattr(texts, "generate_pools", None)
    assert ensure(beside) == first


def test_another_seed_has_its_own_file(tmp_path: Path) -> None:
    assert ensure(tmp_path / "train-1") != ensure(tmp_path / "train-1", seed=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "[[1]]\n", "{not json", "[]\n"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, damage: str) -> None:
    first = ensure(tmp_path / "train-1")
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    assert ensure(tmp_path / "train-1") == first
    assert path.read_text() == whole


@pytest.mark.parametrize("broken", ["replace", "write"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(json, "dumps", _after_first(json.dumps, full))
    with pytest.raises(DataError, match="No space left on device.*free some space"):
        ensure(tmp_path / "train-1")
    assert list(tmp_path.iterdir()) == []


def _after_first(working: object, failing: object) -> object:
    """Let the first call (the name of the file) through and fail the second (its first line)."""
    calls = iter((working, failing))
    return lambda *args, **kwargs: next(calls)(*args, **kwargs)  # type: ignore[operator]


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
