"""Tokenizers of language models: from a folder, or from the local cache of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.errors import WeightsError
from visexpert.io.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files of which a tokenizer has at least one."""


def find_tokenizer(name: str) -> Path | WeightsError:
    """Return a file of a tokenizer, where it is on this machine; else the error that says what is missing."""
    try:
        source = ModelSource.parse(name)
    except WeightsError as error:
        return error
    return source.find(*FILES) or source.absent(*FILES, owner="tokenizer")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer without downloading anything or running code from it.

    Args:
        name: As :meth:`~visexpert.io.source.ModelSource.parse` reads it; a hub's files must be in the local cache.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    found = find_tokenizer(name)
    if isinstance(found, WeightsError):
        raise found
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
