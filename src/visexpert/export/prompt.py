"""The prompt of an exported LLaVA: as its processor writes it, and as the run was trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import processors

from visexpert.errors import WeightsError
from visexpert.types import IMAGE_TOKEN, TextEncoder

QUESTION = "What is in this picture?"
"""What the processor is asked, and what the README shows."""

CONVERSATION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@dataclass(frozen=True)
class PromptCheck:
    """A question as the exported processor and as training frame it.

    Args:
        text: The prompt, the same from both.
        trained_ids: What the run's model reads, the image left out.
        folder_ids: What the processor of the folder makes of the text, the image left out.
    """

    text: str
    trained_ids: tuple[int, ...]
    folder_ids: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """For ``fidelity.json``."""
        return {
            "question": QUESTION,
            "text": self.text,
            "ids_equal": self.trained_ids == self.folder_ids,
            "trained_ids": list(self.trained_ids),
            "folder_ids": list(self.folder_ids),
        }


def check_prompt(encoder: TextEncoder, text: str, ids: Sequence[int], *, image_id: int) -> PromptCheck:
    """Hold what a reloaded processor gave against the run.

    Args:
        encoder: What frames the run's texts.
        text: What the processor wrote for :data:`CONVERSATION`.
        ids: The ids that it made of that, with those of the image.
        image_id: Id of ``<image>`` in the export.

    Raises:
        WeightsError: The text is another one.
    """
    expected = encoder.prompt_text(QUESTION)
    if text != expected:
        raise WeightsError(
            f"The llava export's processor writes the prompt {text!r}, the run was trained on {expected!r}; nothing "
            "was written."
        )
    trained = tuple(token for token in encoder.prompt(QUESTION) if token != IMAGE_TOKEN)
    return PromptCheck(text, trained, tuple(int(token) for token in ids if token != image_id))


def writes_no_frame(tokenizer: Any) -> Any:
    """A tokenizer that adds no tokens of its own to a text: the chat template writes all of them (changed in place)."""
    if tokenizer.num_special_tokens_to_add():
        for name in ("add_bos_token", "add_eos_token"):
            if getattr(tokenizer, name, None):
                setattr(tokenizer, name, False)
            if name in tokenizer.init_kwargs:
                tokenizer.init_kwargs[name] = False
        nothing = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = nothing
    return tokenizer


def prompt_lines(facts: dict[str, Any], tokenizer: Any) -> list[str]:
    """The section of ``README.md``."""
    lines = ["The prompt, as training had it:", "", "```text", facts["text"], "```", ""]
    if facts["ids_equal"]:
        return lines
    trained, folder = (tokenizer.convert_ids_to_tokens(facts[key]) for key in ("trained_ids", "folder_ids"))
    pairs = zip(trained, folder, strict=False)
    place = next(
        (index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(trained), len(folder))
    )
    ours, theirs = (" ".join(tokens[max(place - 1, 0) : place + 2]) for tokens in (trained, folder))
    lines += [
        f"`transformers` reads this text as one piece and gives {len(folder)} token ids besides the image's where "
        f"training had {len(trained)}, since this tokenizer treats a text behind a special token in another way: "
        f"`{theirs}` instead of `{ours}`.",
        "",
    ]
    return lines
