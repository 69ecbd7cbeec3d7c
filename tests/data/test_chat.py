"""Conversations by a chat template that transformers renders, against hand-written token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.data.formats import tokenizer_folder
from visexpert.data import ChatPacker
from visexpert.errors import ConfigError, DataError
from visexpert.types import IMAGE_TOKEN, TextItem

TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + ' ' + eos_token + ' . ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
TALK = TextItem("chat", "how many", "two", history=(("what colour", "red"),))


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer_folder(tmp_path))
    return loaded


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [IMAGE_TOKEN if word == "<image>" else vocabulary[word] for word in text.split()]


def test_answers_are_labeled_up_to_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = ChatPacker(tokenizer, template=TEMPLATE).encode(TALK)
    text = "<s> USER: <image> what colour ASSISTANT: red </s> . USER: how many ASSISTANT: two </s> ."
    assert encoded.ids.tolist() == ids(tokenizer, text)
    learned = [word for word, wanted in zip(text.split(), encoded.supervised, strict=True) if wanted]
    assert learned == ["red", "</s>", "two", "</s>"]


def test_text_alone_has_no_image(tokenizer: PreTrainedTokenizerBase) -> None:
    packer = ChatPacker(tokenizer, template=TEMPLATE)
    assert IMAGE_TOKEN not in packer.encode(TALK, has_image=False).ids
    in_front = ChatPacker(tokenizer, template=TEMPLATE, image_in_text=False)
    assert in_front.encode(TALK).ids.tolist() == packer.encode(TALK, has_image=False).ids.tolist()


def test_the_tokenizers_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="no chat template of its own"):
        ChatPacker(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert (
        ChatPacker(tokenizer).encode(TALK).ids.tolist()
        == ChatPacker(tokenizer, template=TEMPLATE).encode(TALK).ids.tolist()
    )


def test_a_long_conversation_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = ChatPacker(tokenizer, template=TEMPLATE, max_tokens=7).encode(TALK)
    assert len(encoded.ids) == 7 and encoded.supervised.tolist() == [False] * 6 + [True]
    with pytest.raises(DataError, match="max_tokens=5"):
        ChatPacker(tokenizer, template=TEMPLATE, max_tokens=5).encode(TALK)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rewriting = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        ChatPacker(tokenizer, template=rewriting, image_in_text=False).encode(TALK)


def test_an_empty_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="is empty"):
        ChatPacker(tokenizer, template=TEMPLATE).encode(TextItem("chat", "what", " "))
