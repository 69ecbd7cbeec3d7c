"""Tokenizers of language models, and bare questions as the models were trained to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visexpert.errors import WeightsError
from visexpert.language.chat import ChatStyle, LlavaTemplate
from visexpert.language.hub import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptFramer:
    """Frames bare questions as the user's turn of a template, for models that were trained to be asked so.

    Args:
        style: The template.
        tokenizer: Folder or hub id of the language model's tokenizer, which is read on first use.
    """

    def __init__(self, style: ChatStyle, *, tokenizer: str) -> None:
        self._style, self._source = style, tokenizer
        self._packer: LlavaTemplate | None = None

    def __call__(self, prompt: Sequence[int], *, has_image: bool) -> list[int]:
        """Ids of a question to ids of the framed one, its image before it."""
        if self._packer is None:
            self._packer = LlavaTemplate(read_tokenizer(self._source), style=self._style)
        question = str(self._packer.tokenizer.decode(list(prompt), skip_special_tokens=True)).strip()
        return self._packer.prompt(question, has_image=has_image)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, without running code from there.

    Raises:
        WeightsError: It is not to be had, or cannot be read.
    """
    from transformers import AutoTokenizer

    folder = model_folder(source, owner="Tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise WeightsError(
            f"The tokenizer in {folder} cannot be read ({str(error).splitlines()[0][:160]}); fetch its files again."
        ) from error
    return tokenizer
