"""Tokenize conversations with a chat template that transformers renders, such as the tokenizer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from visexpert.chat_jinja import MARK, READ, say
from visexpert.data.packing import BoolArray, IntArray
from visexpert.errors import ConfigError, DataError
from visexpert.types import IMAGE_TOKEN, EncodedText, FrameTokens, TextEncoder, TextItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TURNS = (
    "{% for message in ns.messages %}{% if message['role'] == 'user' %}"
    f"{{% set words = message['content'] | replace('{MARK}', '') | trim %}}"
    "{% if PLACED and ns.images and not ns.asked %}"
    f"{{% set words = '{MARK}\\n' + words %}}"
    "{% endif %}{% set ns.asked = true %}"
    "{% else %}{% set words = message['content'] | trim if message['role'] == 'assistant' else message['content'] %}"
    "{% endif %}{% set ns.turns = ns.turns + [dict(message, content=words)] %}{% endfor %}"
)
"""Sets ``ns.turns`` to the messages, worded as :meth:`ChatPacker._render` words them."""


class ChatPacker(TextEncoder):
    """Formats conversations with a Jinja chat template, such as the tokenizer's own; every answer is labeled.

    Answers are located by rendering the conversation up to each turn, so any template works that only appends.
    For LLaVA's own templates use :class:`~visexpert.language.LlavaTemplate`.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        template: The template; null for the tokenizer's own.
        image_in_text: Put the image, followed by a line break, at the start of the first prompt; otherwise it
            precedes all text.
        max_tokens: Maximum length of a conversation, where an image counts as one token; longer ones are truncated.
            Null for no limit.

    Raises:
        ConfigError: The tokenizer is not a fast one, has no end-of-sequence token, or no template of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        image_in_text: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        frame = FrameTokens.of(tokenizer, purpose="pack conversations")
        if template is None and not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template of its own; give one in Jinja, or use "
                "visexpert.language.LlavaTemplate."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.image_in_text = image_in_text
        self.max_tokens = max_tokens
        self.eos_id, self.pad_id = frame.eos, frame.pad

    def encode(self, item: TextItem, *, has_image: bool = True) -> EncodedText:
        """Tokenize one conversation; each token of an answer is labeled, up to the first <eos> after it.

        Args:
            item: Its ``history``, ``prompt`` and ``answer`` are the turns.
            has_image: Whether there is an image to place.

        Raises:
            ConfigError: The template rewrites earlier turns.
            DataError: An answer is empty, or ``max_tokens`` leaves nothing to learn.
        """
        with_image = has_image and self.image_in_text
        text, spans = self._render([*item.history, (item.prompt, item.answer)], with_image)
        ids, starts, ends = self._tokenize(text, with_image=with_image)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            supervised |= self._up_to_eos(ids, (starts >= start) & (ends <= end) & (ends > starts))
        ids, supervised = ids[: self.max_tokens], supervised[: self.max_tokens]
        if not supervised.any():
            raise DataError(
                f"Nothing of {item} is left to learn within max_tokens={self.max_tokens}; raise it or leave it out."
            )
        return EncodedText(ids, supervised)

    def prompt(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> list[int]:
        """Return the ids of a conversation up to the start of the next answer; see :meth:`TextEncoder.prompt`.

        Raises:
            ConfigError: The template rewrites earlier turns.
        """
        with_image = has_image and self.image_in_text
        text, _ = self._render([*history, (question, None)], with_image)
        ids: list[int] = self._tokenize(text, with_image=with_image)[0].tolist()
        return ids

    def prompt_text(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> str:
        """Return the conversation up to the start of the next answer; see :meth:`TextEncoder.prompt_text`.

        Raises:
            ConfigError: The template rewrites earlier turns.
        """
        text, _ = self._render([*history, (question, None)], has_image and self.image_in_text)
        return MARK * (has_image and not self.image_in_text) + text

    @property
    def chat_template(self) -> str:
        """The template with the image's position; see :attr:`TextEncoder.chat_template`."""
        own = self.tokenizer.get_chat_template(self.template)
        front = "" if self.image_in_text else f"{{% if ns.images %}}{say(MARK)}{{% endif %}}"
        turns = _TURNS.replace("PLACED", str(self.image_in_text).lower())
        return (
            f"{READ}{front}{{% set ns.turns = [] %}}{{% set ns.asked = false %}}{turns}"
            # Plus signs keep the template's spaces; Jinja drops a line break at the very end.
            f"{{% set messages = ns.turns %}}{{% set text +%}}{own.removesuffix(chr(10))}{{%+ endset %}}"
            "{{ text.rstrip(' ') if add_generation_prompt else text }}"
        )

    def _render(self, turns: Sequence[tuple[str, str | None]], with_image: bool) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, and the start and end of each answer in it.

        Spaces that a template puts before an answer belong to the answer: tokenizers make one token of a word and the
        space before it.
        """
        messages: list[dict[str, str]] = []
        spans: list[tuple[int, int]] = []
        text = ""
        for prompt, answer in turns:
            if answer is not None and not answer.strip():
                raise DataError(f"An answer to {prompt[:80]!r} is empty; correct the annotation or leave the item out.")
            content = prompt.replace(MARK, "").strip()
            if with_image and not messages:
                content = f"{MARK}\n{content}"
            messages.append({"role": "user", "content": content})
            opened = self._text(messages, open_answer=True).rstrip(" ")
            if answer is None:
                return opened, spans
            messages.append({"role": "assistant", "content": answer.strip()})
            closed = self._text(messages, open_answer=False)
            if not (opened.startswith(text) and closed.startswith(opened)):
                raise ConfigError(
                    "The chat template rewrites earlier turns, so answers cannot be told from prompts; use another."
                )
            spans.append((len(opened), len(closed)))
            text = closed
        return text, spans

    def _text(self, messages: list[dict[str, str]], *, open_answer: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=open_answer
            )
        )

    def _tokenize(self, text: str, *, with_image: bool) -> tuple[IntArray, IntArray, IntArray]:
        """Return the ids and the characters at which each starts and ends; the image's mark is one token."""
        place = text.index(MARK) if with_image else 0
        stretches = [(0, text[:place])] if place else []
        stretches.append((place + len(MARK) * with_image, text[place + len(MARK) * with_image :]))
        rows: list[list[tuple[int, int, int]]] = []
        for begin, stretch in stretches:
            encoded = self.tokenizer(stretch, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            rows.append([(token, begin + start, begin + end) for token, (start, end) in pairs])
        if with_image:
            rows.insert(len(rows) - 1, [(IMAGE_TOKEN, place, place)])
        ids, starts, ends = np.array([token for row in rows for token in row], dtype=np.int64).reshape(-1, 3).T
        return ids, starts, ends

    def _up_to_eos(self, ids: IntArray, inside: BoolArray) -> BoolArray:
        """Drop labels after <eos>: templates add line breaks there, but a model that stops never generates them."""
        ends = np.flatnonzero(inside & (ids == self.eos_id))
        return inside if not len(ends) else inside & (np.arange(len(ids)) <= ends[0])
