"""Tokenizers of language models: from a folder, or from the local cache of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visexpert.errors import WeightsError
from visexpert.io.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A tokenizer has at least one of these."""

OWNER = "tokenizer"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer without downloading anything or running code from it.

    Args:
        name: As :meth:`~visexpert.io.source.ModelSource.parse` reads it; a hub's files must be in the local cache.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    source = ModelSource.parse(name)
    found = source.find(*FILES)
    if found is None:
        raise source.absent(*FILES, owner=OWNER)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            found.parent, local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises all sorts on damaged files
        raise WeightsError(
            f"The tokenizer {name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]}); "
            "fetch it again or name another."
        ) from error
    return tokenizer
