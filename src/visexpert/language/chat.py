"""LLaVA-1.5's conversation format: template, position of the image, labels on assistant turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from visexpert.chat_jinja import MARK as MARKER
from visexpert.chat_jinja import READ, STRAY_ROLE, say, written
from visexpert.errors import ConfigError, DataError
from visexpert.types import IMAGE_TOKEN, EncodedText, FrameTokens, TextEncoder, TextItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatStyle = Literal["vicuna_v1", "llama_2", "mistral", "plain"]

Turns: TypeAlias = Sequence[tuple[str, str | None]]
"""Turns of (question, answer); the answer is None if it is to be generated."""

SYSTEMS: dict[ChatStyle, str] = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "llama_2": "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.",
    "mistral": "",
    "plain": "",
}
"""System texts, word for word as in LLaVA's training; models are sensitive to the wording."""


class LlavaTemplate(TextEncoder):
    """Formats conversations with one of LLaVA-1.5's templates (haotian-liu/LLaVA, ``conversation.py``).

    - ``vicuna_v1``: ``USER: question ASSISTANT: answer</s>``, the system text before the first turn;
    - ``llama_2``: ``<s>[INST] question [/INST] answer </s>``, the system text inside the first question;
    - ``mistral``: the same with one ``<s>`` and no system text;
    - ``plain``: the answer and a line break, without questions (stage 1).

    The image comes before its question on its own line, or before a plain answer.
    Every answer is labeled, with its end token and the space before it: Llama's tokenizers turn ``3`` after a space
    into two tokens, and the model must generate both (as in LLaVA's ``preprocess_v1``).

    Ids equal LLaVA's, which tokenizes the text on each side of the image as a whole, except that words such as ``</s>``
    in a text stay plain text.

    Args:
        tokenizer: A fast tokenizer; :class:`~visexpert.types.FrameTokens` defines the tokens that open and end a text.
        style: The template.
        system: Another system text; null for the template's.
        max_tokens: Longest item, the image counted as one; longer ones are truncated. Null for no limit.

    Raises:
        ConfigError: An unknown style, a tokenizer without offsets, or a system text for a style that takes none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        style: ChatStyle = "vicuna_v1",
        system: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if style not in get_args(ChatStyle):
            raise ConfigError(f"The chat template {style!r} is unknown; use one of {', '.join(get_args(ChatStyle))}.")
        frame = FrameTokens.of(tokenizer, purpose="frame conversations")
        if system and not SYSTEMS[style]:
            raise ConfigError(f"The chat template {style!r} takes no system text; leave system out.")
        self.tokenizer, self.style = tokenizer, style
        self.system = SYSTEMS[style] if system is None else system
        self.max_tokens = max_tokens
        self.bos_id, self.eos_id, self.pad_id = frame.bos, frame.eos, frame.pad
        self._lead = _lead_of(tokenizer, self.eos_id)

    def encode(self, item: TextItem, *, has_image: bool = True) -> EncodedText:
        """Encode a whole conversation: the item's history, then its prompt and answer.

        Raises:
            DataError: A sample with an image does not have exactly one ``<image>``, or one without has any; an answer
                is empty; or no answer fits within ``max_tokens``.
        """
        turns = self._with_marker([*item.history, (item.prompt, item.answer)], has_image)
        if any(not answer.strip() for _, answer in turns if answer is not None):
            raise DataError(f"An answer of {item} is empty; correct the annotation or leave the item out.")
        text = self._tokenize(self._parts(turns))
        if self.max_tokens is not None:
            text = EncodedText(text.ids[: self.max_tokens], text.supervised[: self.max_tokens])
            if not text.supervised.any():
                raise DataError(
                    f"The first prompt of {item} takes all of max_tokens={self.max_tokens}; raise it or shorten that."
                )
        return text

    def prompt(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> list[int]:
        """Return the ids of a conversation up to the start of the next answer.

        Raises:
            DataError: As :meth:`encode`.
        """
        turns = self._with_marker([*history, (question, None)], has_image)
        ids: list[int] = self._tokenize(self._parts(turns)).ids.tolist()
        return ids

    def prompt_text(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> str:
        """Return the conversation up to the start of the next answer; see :meth:`TextEncoder.prompt_text`.

        Raises:
            DataError: As :meth:`encode`.
        """
        parts = self._parts(self._with_marker([*history, (question, None)], has_image))
        return "".join(self._written(part) for part in parts)

    def _written(self, part: _Part) -> str:
        if part.token is None:
            return part.text
        return MARKER if part.token == IMAGE_TOKEN else written(self.tokenizer, part.token)

    @property
    def chat_template(self) -> str:
        """See :attr:`TextEncoder.chat_template`; it includes the system text."""
        bos, eos = (say(written(self.tokenizer, token)) for token in (self.bos_id, self.eos_id))
        answer, call = "{{ message['content'] }}", ""
        if self.style == "plain":
            opening, asked = f"{{% if ns.images %}}{say(MARKER)}{{% endif %}}", _ONE_TURN
            closed = answer + say("\n")
        elif self.style == "vicuna_v1":
            opening, call = "", say(" ASSISTANT:")
            asked = _first(say(self.system + " " if self.system else "")) + say("USER: ") + _ASKED
            closed = call + say(" ") + answer + eos
        else:
            opening, system = "", f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
            asked = (_first("", bos) if self.style == "llama_2" else "") + say("[INST] ") + _first(say(system))
            asked += _ASKED + say(" [/INST]")
            closed = say(" ") + answer + say(" ") + eos
        return (
            f"{READ}{bos}{opening}{{% for message in ns.messages %}}{{% if message['role'] == 'user' %}}{asked}"
            f"{{% elif message['role'] == 'assistant' %}}{closed}{{% else %}}{STRAY_ROLE}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{call}{{% endif %}}"
        )

    def _with_marker(self, turns: Turns, has_image: bool) -> Turns:
        """Add the image marker to the first question, unless a question has it."""
        count = sum(question.count(MARKER) for question, _ in turns)
        if has_image and not count:
            (question, answer), *others = turns
            return [(MARKER + question, answer), *others]
        if count != int(has_image):
            raise DataError(
                f"The conversation that begins {turns[0][0][:60]!r} has {count} image tokens ({MARKER}), but its "
                f"sample has {int(has_image)} image; write {MARKER} once where there is an image, and nowhere else."
            )
        return turns

    def _parts(self, turns: Turns) -> Iterator[_Part]:
        yield _Part(token=self.bos_id)
        if self.style == "plain":
            yield from self._plain(turns)
            return
        for number, (question, answer) in enumerate(turns):
            frame = self._vicuna if self.style == "vicuna_v1" else self._bracketed
            yield from frame(number, question, answer)
            if answer is not None:
                yield _Part(token=self.eos_id, learned=True)

    def _vicuna(self, number: int, question: str, answer: str | None) -> Iterator[_Part]:
        yield _Part(f"{self.system} USER: " if number == 0 and self.system else "USER: ")
        yield from _question(question)
        yield _Part(" ASSISTANT:")
        if answer is not None:
            yield _Part(f" {answer}", learned=True)

    def _bracketed(self, number: int, question: str, answer: str | None) -> Iterator[_Part]:
        if number and self.style == "llama_2":
            yield _Part(token=self.bos_id)
        yield _Part(f"[INST] <<SYS>>\n{self.system}\n<</SYS>>\n\n" if number == 0 and self.system else "[INST] ")
        yield from _question(question)
        yield _Part(" [/INST]")
        if answer is not None:
            yield _Part(f" {answer} ", learned=True)

    def _plain(self, turns: Turns) -> Iterator[_Part]:
        if len(turns) != 1:
            raise DataError(f"The chat template 'plain' takes one answer per image, not {len(turns)} turns.")
        ((question, answer),) = turns
        if MARKER in question:
            yield _Part(token=IMAGE_TOKEN)
        if answer is not None:
            yield _Part(f"{answer}\n", learned=True)

    def _tokenize(self, parts: Iterator[_Part]) -> EncodedText:
        """Tokenize each stretch of text as a whole, with the special tokens between them."""
        ids: list[int] = []
        supervised: list[bool] = []
        for is_text, group in groupby(parts, key=lambda part: part.token is None):
            stretch = list(group)
            if is_text:
                # LLaVA restarts the tokenizer at the start and after the image, so it sees the start of a text there.
                starts = len(ids) <= 1 or ids[-1] == IMAGE_TOKEN
                found = self._stretch(stretch, lead="" if starts else self._lead)
                ids += found.ids.tolist()
                supervised += found.supervised.tolist()
            else:
                ids += [part.token for part in stretch if part.token is not None]
                supervised += [part.learned for part in stretch]
        return EncodedText(np.asarray(ids, dtype=np.int64), np.asarray(supervised, dtype=np.bool_))

    def _stretch(self, parts: Sequence[_Part], *, lead: str) -> EncodedText:
        text = "".join(part.text for part in parts)
        learned = np.repeat([part.learned for part in parts], [len(part.text) for part in parts])
        ids, offsets = _behind(self.tokenizer, lead, text)
        supervised = [bool(learned[begin:end].any()) for begin, end in offsets]
        return EncodedText(np.asarray(ids, dtype=np.int64), np.asarray(supervised, dtype=np.bool_))


@dataclass(frozen=True)
class _Part:
    """A stretch of text, or one special token; ``learned`` marks what the model must generate."""

    text: str = ""
    token: int | None = None
    learned: bool = False


_ASKED = (
    f"{{% if '{MARKER}' in message['content'] %}}{say(MARKER)}"
    f"{{% set words = message['content'] | replace('{MARKER}', '') | trim %}}"
    "{% if words %}{{ '\\n' + words }}{% endif %}{% else %}{{ message['content'] }}{% endif %}"
)
"""The same as :func:`_question`, in Jinja."""

_ONE_TURN = (
    "{% if not loop.first %}"
    "{{ raise_exception('The model was trained on one text per image; leave earlier turns out.') }}{% endif %}"
)


def _first(text: str, otherwise: str = "") -> str:
    """Return Jinja for a text that depends on whether the message is the first."""
    return f"{{% if loop.first %}}{text}{{% else %}}{otherwise}{{% endif %}}" if text or otherwise else ""


_LEADS = ("", "\n", ".", "\n\n", "</")
"""Texts that may stand in for a special token, so that the following text is tokenized as after one."""


def _lead_of(tokenizer: PreTrainedTokenizerBase, eos_id: int) -> str:
    """Return a prefix that gives a text the ids it has after a special token.

    Some tokenizers (Llama's with ``legacy: false``) mark the start of a word at the start of a text, but not after a
    special token. User text must not be parsed for special tokens, so the token itself cannot be the prefix.

    Raises:
        ConfigError: No known prefix works.
    """
    special = str(tokenizer.convert_ids_to_tokens(eos_id))
    probes = ("USER: a", "[INST] a", "3", " x")
    wanted = [tokenizer(special + probe, add_special_tokens=False)["input_ids"] for probe in probes]
    for lead in _LEADS:
        if all([eos_id, *_behind(tokenizer, lead, probe)[0]] == ids for probe, ids in zip(probes, wanted, strict=True)):
            return lead
    raise ConfigError(
        f"The tokenizer {tokenizer.name_or_path!r} tokenizes texts after {special!r} in a way that LlavaTemplate does "
        "not support; use visexpert.data.ChatPacker with a chat template in Jinja."
    )


def _behind(tokenizer: PreTrainedTokenizerBase, lead: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text after a prefix, and the characters that each id covers."""
    encoded = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    inside = [(token, (begin - len(lead), end - len(lead))) for token, (begin, end) in pairs if begin >= len(lead)]
    return [token for token, _ in inside], [offset for _, offset in inside]


def _question(question: str) -> Iterator[_Part]:
    """Yield the user's words, with the image before them on its own line, wherever the marker was."""
    if MARKER not in question:
        yield _Part(question)
        return
    yield _Part(token=IMAGE_TOKEN)
    words = question.replace(MARKER, "").strip()
    if words:
        yield _Part(f"\n{words}")
