"""What a model is asked is what it read in training before the answer, made of the question alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tests.data.formats import write_jpeg, write_json_lines
from tests.language import tokenizer_kinds
from tests.language.test_chat import LLAMA, TALK, VICUNA
from visexpert.captioning import text_encoder_of
from visexpert.data import POPE, ChatPacker, TextPacker
from visexpert.errors import ConfigError
from visexpert.language import LlavaTemplate
from visexpert.language.chat import ChatStyle
from visexpert.runs import SavedRun
from visexpert.types import IMAGE_TOKEN, FrameTokens, TextEncoder, TextItem

JINJA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
    "{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
ANSWERS = ("3", "12", "Red.", "yes", "-1", "(a)", "你好", "é", "✓ 3")
QUESTION = "How many?"


def encoders(tokenizer: PreTrainedTokenizerBase) -> dict[str, TextEncoder]:
    framed = {style: LlavaTemplate(tokenizer, style=style) for style in get_args(ChatStyle)}
    return {"none": TextPacker(tokenizer), "jinja": ChatPacker(tokenizer, template=JINJA), **framed}


@pytest.mark.parametrize("kind", tokenizer_kinds.GENERATIVE)
@pytest.mark.parametrize("answer", ANSWERS)
def test_all_that_stands_behind_the_prompt_is_learned(kind: str, answer: str) -> None:
    for name, encoder in encoders(tokenizer_kinds.GENERATIVE[kind]()).items():
        for has_image in (True, False):
            whole = encoder.encode(TextItem("vqa", QUESTION, answer), has_image=has_image)
            asked = encoder.prompt(QUESTION, has_image=has_image)
            assert whole.ids[: len(asked)].tolist() == asked, name
            assert whole.supervised.tolist() == [False] * len(asked) + [True] * (len(whole.ids) - len(asked)), name


@pytest.mark.parametrize("kind", tokenizer_kinds.GENERATIVE)
@pytest.mark.parametrize("style", ["vicuna_v1", "llama_2", "mistral"])
def test_an_answer_can_be_written_back(kind: str, style: ChatStyle) -> None:
    """What is learned, written by a perfect model and read as evaluation reads it, is the answer."""
    tokenizer = tokenizer_kinds.GENERATIVE[kind]()
    for encoder in (LlavaTemplate(tokenizer, style=style), ChatPacker(tokenizer, template=JINJA)):
        for answer in ANSWERS:
            whole = encoder.encode(TextItem("vqa", QUESTION, answer))
            written = whole.ids[len(encoder.prompt(QUESTION)) :].tolist()
            assert written[-1] == encoder.eos_id
            assert str(tokenizer.decode(written[:-1], skip_special_tokens=True)).strip() == answer


def as_llava(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """``tokenizer_image_token`` of LLaVA: each stretch around the image by one call, <bos> before the first."""
    chunks = [tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in prompt.split("<image>")]
    ids = [FrameTokens.of(tokenizer, purpose="open a text").bos, *chunks[0]]
    for chunk in chunks[1:]:
        ids += [IMAGE_TOKEN, *chunk]
    return [int(token) for token in ids]


CONVERSATIONS: dict[ChatStyle, str] = {
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat colour? ASSISTANT: Red.</s>USER: And now? ASSISTANT: Blue.</s>",
    "llama_2": f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat colour? [/INST] Red. </s>"
    "<s>[INST] And now? [/INST] Blue. </s>",
    "mistral": "[INST] <image>\nWhat colour? [/INST] Red. </s>[INST] And now? [/INST] Blue. </s>",
}
"""What LLaVA's ``conv.get_prompt`` makes of TALK."""


@pytest.mark.parametrize("style", CONVERSATIONS)
@pytest.mark.parametrize("kind", tokenizer_kinds.GENERATIVE)
def test_ids_are_those_of_llava(kind: str, style: ChatStyle) -> None:
    tokenizer = tokenizer_kinds.GENERATIVE[kind]()
    text = CONVERSATIONS[style]
    if tokenizer.bos_token is None:
        text = re.sub("</?s>", str(tokenizer.eos_token), text)
    assert LlavaTemplate(tokenizer, style=style).encode(TALK).ids.tolist() == as_llava(tokenizer, text)


def test_later_turns_begin_as_the_tokenizer_begins_them() -> None:
    turns = {
        legacy: tokenizer_kinds.llama(legacy=legacy).convert_ids_to_tokens(
            LlavaTemplate(tokenizer_kinds.llama(legacy=legacy)).encode(TALK).ids.clip(min=0).tolist()
        )
        for legacy in (True, False)
    }
    for legacy, first in ((True, "▁USER"), (False, "USER")):
        assert turns[legacy][turns[legacy].index("</s>") + 1] == first


def test_berts_tokens_frame_texts() -> None:
    tokenizer = tokenizer_kinds.bert()
    packer = TextPacker(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(packer.encode(TextItem("vqa", "a b", "c")).ids.tolist())
    assert tokens == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert (packer.eos_id, packer.pad_id) == (tokenizer.sep_token_id, tokenizer.pad_token_id)
    tokenizer.sep_token = None
    with pytest.raises(ConfigError, match=r"end-of-sequence token \(or BERT's \[SEP\]\)"):
        TextPacker(tokenizer)


def test_words_of_users_are_no_special_tokens() -> None:
    for kind, make in tokenizer_kinds.GENERATIVE.items():
        for name, encoder in encoders(make()).items():
            if name != "jinja":  # a template renders special tokens and words as one text
                asked = encoder.prompt(f"what is {make().eos_token} ?", has_image=False)
                assert encoder.eos_id not in asked[1:], (kind, name)


@pytest.mark.parametrize("template", ["none", "jinja", *get_args(ChatStyle)])
def test_evaluation_asks_as_caption_does(template: str, tmp_path: Path) -> None:
    probe = {"image": "COCO_val2014_000000000007.jpg", "text": "Is there a dog?", "label": "no"}
    write_json_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, **probe}])
    write_jpeg(tmp_path / "val2014" / probe["image"], "blue")
    for kind, make in tokenizer_kinds.GENERATIVE.items():
        folder = str(tmp_path / kind)
        make().save_pretrained(folder)
        data = POPE(
            root=str(tmp_path),
            kinds=["random"],
            tokenizer=folder,
            image_size=8,
            num_workers=0,
            template=None if template == "none" else lambda tokenizer: encoders(tokenizer)[template],
        )
        data.prepare_data()
        data.setup("test")
        (batch,) = data.test_dataloader()
        run: Any = SavedRun(tmp_path, {}, None, data, 0)  # type: ignore[arg-type]
        ((item,),), ((prompt,),) = batch.items, batch.prompts
        assert list(prompt) == text_encoder_of(run).prompt(item.prompt)
        assert batch.text is not None
        before = int((batch.text.labels_BN[0] != -100).int().argmax())
        assert list(prompt) == batch.text.ids_BN[0, :before].tolist()


HISTORY = (("What colour?", "Red."), ("And now ?", " It's 3\nor \\n 4. "))
OWN = (
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}{%- set messages = messages[1:] -%}"
    "{%- endif %}\n"
    "{%- for m in messages %}\n    {{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|assistant|> ' }}\n{%- endif %}\n"
)
"""Of several lines, as language models bring them."""


def conversation(
    question: str, history: Sequence[tuple[str, str]], *, has_image: bool, parts: bool
) -> list[dict[str, Any]]:
    """The messages of a user, contents as parts or as strings."""
    messages: list[dict[str, Any]] = []
    for asked, answer in (*history, (question, None)):
        marked = has_image and not messages
        content: Any = f"<image>\n{asked}" if marked else asked
        if parts:
            content = [{"type": "image"}] * marked + [{"type": "text", "text": asked}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if parts else answer})
    return messages


def written_encoders(tokenizer: PreTrainedTokenizerBase) -> dict[str, TextEncoder]:
    tokenizer.chat_template = OWN
    system = "Say it's {{ so }} \\ \n你好."
    return encoders(tokenizer) | {
        "own": ChatPacker(tokenizer),
        "own, image in front": ChatPacker(tokenizer, image_in_text=False),
        "vicuna, system": LlavaTemplate(tokenizer, system=system),
        "vicuna, no system": LlavaTemplate(tokenizer, system=""),
    }


@pytest.mark.parametrize("kind", tokenizer_kinds.GENERATIVE)
def test_the_chat_template_writes_the_prompt_of_training(kind: str) -> None:
    tokenizer = tokenizer_kinds.GENERATIVE[kind]()
    for name, encoder in written_encoders(tokenizer).items():
        for history in ((), HISTORY) if name not in ("none", "plain") else ((),):
            for has_image, parts in product((True, False), repeat=2):
                rendered = tokenizer.apply_chat_template(
                    conversation("  How many? ", history, has_image=has_image, parts=parts),
                    chat_template=encoder.chat_template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
                expected = encoder.prompt_text("  How many? ", history=history, has_image=has_image)
                assert rendered == expected, (name, history, has_image, parts)
                assert rendered.count("<image>") == has_image


@pytest.mark.parametrize("kind", tokenizer_kinds.GENERATIVE)
def test_the_written_prompt_is_what_is_asked(kind: str) -> None:
    """Cut at its special tokens and tokenized as LLaVA does, it gives the ids of the prompt."""
    tokenizer = tokenizer_kinds.GENERATIVE[kind]()
    for name, encoder in written_encoders(tokenizer).items():
        for history in ((), HISTORY) if name not in ("none", "plain") else ((),):
            for has_image in (True, False):
                text = encoder.prompt_text(QUESTION, history=history, has_image=has_image)
                asked = encoder.prompt(QUESTION, history=history, has_image=has_image)
                front = has_image and IMAGE_TOKEN not in asked
                chunks = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("<image>")]
                bos = FrameTokens.of(tokenizer, purpose="open a text").bos
                if chunks[0] and chunks[0][0] == bos and isinstance(encoder, LlavaTemplate):
                    start = text.split("<image>")[0].removeprefix(str(tokenizer.convert_ids_to_tokens(bos)))
                    chunks[0] = [bos, *tokenizer(start, add_special_tokens=False)["input_ids"]]
                if isinstance(encoder, TextPacker):
                    chunks[-1] = [bos, *tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
                ids = [*chunks[0], *(token for chunk in chunks[1:] for token in (IMAGE_TOKEN, *chunk))]
                assert ids == [IMAGE_TOKEN] * front + asked, (name, history, has_image)


@pytest.mark.parametrize("style", ["vicuna_v1", "llama_2", "mistral", "plain", "none"])
def test_a_whole_conversation_is_written_as_it_is_learned(style: str) -> None:
    tokenizer = tokenizer_kinds.byte_level()  # whose ids are those of its text, whatever stands before
    encoder = encoders(tokenizer)[style]
    history = () if style in ("none", "plain") else HISTORY
    for has_image in (True, False):
        messages = conversation(QUESTION, history, has_image=has_image, parts=True)
        messages.append({"role": "assistant", "content": "Blue."})
        text = str(tokenizer.apply_chat_template(messages, chat_template=encoder.chat_template, tokenize=False))
        learned = encoder.encode(TextItem("vqa", QUESTION, "Blue.", history=history), has_image=has_image).ids
        ids = tokenizer(text.replace("<image>", ""), add_special_tokens=False)["input_ids"]
        assert ids == [token for token in learned.tolist() if token != IMAGE_TOKEN]
        assert text.count("<image>") == has_image


@pytest.mark.parametrize(
    ("style", "messages", "said"),
    [
        ("vicuna_v1", [{"role": "system", "content": "Be brief."}], "role system"),
        ("vicuna_v1", [{"role": "user", "content": "<image> and <image>"}], "one image"),
        ("mistral", [{"role": "user", "content": [{"type": "video"}]}], "no video"),
        ("none", conversation(QUESTION, HISTORY, has_image=True, parts=True), "one question at a time"),
        ("plain", conversation(QUESTION, HISTORY, has_image=True, parts=True), "one text per image"),
    ],
)
def test_what_training_never_wrote_is_refused(style: str, messages: list[dict[str, Any]], said: str) -> None:
    tokenizer = tokenizer_kinds.byte_level()
    with pytest.raises(TemplateError, match=said):
        tokenizer.apply_chat_template(messages, chat_template=encoders(tokenizer)[style].chat_template, tokenize=False)
