"""Conversations as LLaVA-1.5 frames them, word for word, and what of them is learned."""

from __future__ import annotations

import re

import pytest

from tests.language.tokenizers_made import llama_like
from visexpert.data import pack
from visexpert.errors import ConfigError, DataError
from visexpert.language import LlavaTemplate
from visexpert.language.chat import ChatStyle
from visexpert.types import IMAGE_TOKEN, EncodedText, TextItem

TOKENIZER = llama_like()
BOS, EOS = 0, 1
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
TALK = TextItem("chat", "And now?", "Blue.", history=(("<image>\nWhat colour?", "Red."),))


def template(style: ChatStyle = "vicuna_v1", **options: object) -> LlavaTemplate:
    return LlavaTemplate(TOKENIZER, style=style, **options)  # type: ignore[arg-type]


def pieces(text: str) -> list[int]:
    """Ids of a text written as LLaVA writes it: special tokens apart, each stretch between them on its own."""
    special = {"<s>": BOS, "</s>": EOS, "<image>": IMAGE_TOKEN}
    ids: list[int] = []
    for stretch in re.split("(<s>|</s>|<image>)", text):
        if stretch in special:
            ids.append(special[stretch])
        elif stretch:
            ids += [int(token) for token in TOKENIZER(stretch, add_special_tokens=False)["input_ids"]]
    return ids


def learned(text: EncodedText) -> list[str]:
    """Runs of supervised tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, wanted in zip(text.ids.tolist(), text.supervised.tolist(), strict=True):
        if wanted:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(TOKENIZER.decode(run)) for run in runs if run]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (
            "vicuna_v1",
            f"<s>{VICUNA} USER: <image>\nWhat colour? ASSISTANT: Red.</s>USER: And now? ASSISTANT: Blue.</s>",
        ),
        (
            "llama_2",
            f"<s>[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat colour? [/INST] Red. </s>"
            "<s>[INST] And now? [/INST] Blue. </s>",
        ),
        ("mistral", "<s>[INST] <image>\nWhat colour? [/INST] Red. </s>[INST] And now? [/INST] Blue. </s>"),
    ],
)
def test_whole_conversations(style: ChatStyle, text: str) -> None:
    found = template(style).encode(TALK)
    assert found.ids.tolist() == pieces(text)
    space = "" if style == "vicuna_v1" else " "
    assert learned(found) == [f"Red.{space}</s>", f"Blue.{space}</s>"]
    assert template(style).prompt("And now?", history=TALK.history) == pieces(text[: text.rindex(" Blue.")])


def test_plain_is_the_image_and_its_caption() -> None:
    item = TextItem("chat", "Describe it briefly.\n<image>", "a red cube")
    found = template("plain").encode(item)
    assert found.ids.tolist() == pieces("<s><image>a red cube\n")
    assert learned(found) == ["a red cube\n"]
    assert template("plain").prompt("Describe it.") == [BOS, IMAGE_TOKEN]
    with pytest.raises(DataError, match="'plain' takes one answer per image, not 2 turns"):
        template("plain").encode(TALK)


def test_the_image_stands_before_the_words_wherever_its_marker_was() -> None:
    first = template().prompt("<image>\nWhat?")
    assert (
        first
        == template().prompt("What?\n<image>")
        == template().prompt("What?")
        == template().prompt("What? <image> ")
    )
    assert first == pieces(f"<s>{VICUNA} USER: <image>\nWhat? ASSISTANT:")


def test_text_alone_has_no_marker() -> None:
    found = template().encode(TextItem("chat", "Hi", "Yes."), has_image=False)
    assert found.ids.tolist() == pieces(f"<s>{VICUNA} USER: Hi ASSISTANT: Yes.</s>")


def test_counts_of_markers_are_checked() -> None:
    with pytest.raises(
        DataError, match=r"that begins '<image>\\nWhat colour\?' has 1 image tokens .* sample has 0 image"
    ):
        template().encode(TALK, has_image=False)
    twice = TextItem("chat", "<image> or <image>?", "Yes.")
    with pytest.raises(DataError, match="has 2 image tokens .* sample has 1 image; write <image> once"):
        template().encode(twice)


def test_special_words_in_a_text_stay_words() -> None:
    """Nobody can end the assistant's turn from inside a question."""
    ids = template().prompt("</s><s> hello", has_image=False)
    assert ids.count(EOS) == 0 and ids.count(BOS) == 1


def test_another_system_text_and_none() -> None:
    assert template(system="Be brief.").prompt("Hi", has_image=False) == pieces("<s>Be brief. USER: Hi ASSISTANT:")
    assert template(system="").prompt("Hi", has_image=False) == pieces("<s>USER: Hi ASSISTANT:")
    with pytest.raises(ConfigError, match="'mistral' takes no system text"):
        template("mistral", system="Be brief.")
    with pytest.raises(ConfigError, match="chat template 'vicuna' is unknown; use one of vicuna_v1, llama_2, mistral"):
        template("vicuna")  # type: ignore[arg-type]


def test_long_conversations_are_cut_at_their_end() -> None:
    whole = template().encode(TALK)
    answer = int(whole.supervised.argmax())
    short = template(max_tokens=answer + 2).encode(TALK)
    assert short.ids.tolist() == whole.ids.tolist()[: answer + 2] and int(short.supervised.sum()) == 2
    with pytest.raises(DataError, match=f"takes all of max_tokens={answer}; raise it"):
        template(max_tokens=answer).encode(TALK)
    with pytest.raises(DataError, match="An answer of .* is empty"):
        template().encode(TextItem("chat", "Hi", " "))


def test_what_it_makes_can_be_packed() -> None:
    found = template().encode(TALK)
    text = pack([[(found.ids, len(found.ids))]], template().pad_id)
    assert text.ids_BN[0].tolist() == found.ids.tolist()
