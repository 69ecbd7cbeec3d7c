"""Tokenizers of language models: from a folder, or from the local cache of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A tokenizer has at least one of these."""


def has_tokenizer(name: str) -> bool:
    """Tell whether a folder, or the hub's local cache, holds a tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name).expanduser()
    if folder.exists():
        return any((folder / file).is_file() for file in FILES)
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES)
    except ValueError:  # a path that does not exist is no id
        return False


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer without downloading anything or running code from it.

    Args:
        name: Folder, or id on the hub whose files are in the local cache.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(name):
        raise WeightsError(missing_tokenizer(name))
    folder = Path(name).expanduser()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder if folder.exists() else name, local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises all sorts on damaged files
        raise WeightsError(
            f"The tokenizer {name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]}); "
            "fetch it again or name another."
        ) from error
    return tokenizer


def missing_tokenizer(name: str) -> str:
    """The sentence that says where a tokenizer was looked for and how to get it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(name).expanduser()
    if folder.exists() or folder.is_absolute():
        return f"There is no tokenizer in {folder} (none of {', '.join(FILES)}); name a folder of save_pretrained."
    return (
        f"There is no tokenizer {name}: neither a folder of that name nor an entry in {HF_HUB_CACHE}; fetch it with  "
        f"hf download {name} --include 'tokenizer*' 'special_tokens*' 'config.json'"
    )
