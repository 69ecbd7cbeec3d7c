"""The sample that a plan counts: one image without pixels, and a text of a given length."""

from __future__ import annotations

import torch

from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.types import IGNORE_INDEX, Batch, TextBatch

TEXT_TOKENS = 124
"""With the 576 tokens of a CLIP L/14-336 in front these are 700, about LLaVA's mean."""


def sample_of(method: Method, *, text_tokens: int, answer_tokens: int | None, image_size: int) -> Batch:
    """A batch of one: pixels on ``meta``, ids real, so that the method's own step runs on it.

    Args:
        method: Whose language model limits the length of an item; longer texts are several items.
        text_tokens: Tokens of the image's texts, all items together.
        answer_tokens: Those that are supervised; None for half of them.
        image_size: Side of the image.

    Raises:
        ConfigError: Too few tokens, or more answers than text.
    """
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    text = _text(text_tokens, answer_tokens, method.language.max_tokens) if method.reads_text else None
    return Batch(image, torch.zeros(1, dtype=torch.long), split="", text=text)


def _text(tokens: int, answers: int | None, longest: int | None) -> TextBatch:
    answers = tokens // 2 if answers is None else answers
    if tokens < 2 or not 0 < answers < tokens:
        raise ConfigError(
            f"--text-tokens {tokens} and --answer-tokens {answers} cannot be; a text has at least 2 tokens, and some "
            "but not all of them are answers."
        )
    count = 1 if longest is None else -(-tokens // longest)
    ends = [round(tokens * (item + 1) / count) for item in range(count)]
    answered = [round(answers * (item + 1) / count) for item in range(count)]
    labels, segments, positions = [], [], []
    for item, (end, done) in enumerate(zip(ends, answered, strict=True)):
        length = end - (ends[item - 1] if item else 0)
        labeled = min(done - (answered[item - 1] if item else 0), length - 1)
        labels += [IGNORE_INDEX] * (length - labeled) + [1] * labeled
        segments += [item + 1] * length
        positions += list(range(length))
    rows = (torch.tensor([values]) for values in ([1] * tokens, labels, segments, positions))
    return TextBatch(*rows)
