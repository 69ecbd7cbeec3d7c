"""Where the files of a language model are: a folder, or an id of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from visexpert.errors import WeightsError
from visexpert.io.weights import ZOO_PREFIX, resolve_source

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""All that is needed to build a model and its tokenizer, without weights."""


def model_folder(source: str, *, owner: str, patterns: Sequence[str] = SMALL_FILES) -> Path:
    """The folder of a model's files, fetched from the hub where they are not here and the hub can be reached.

    Args:
        source: A folder in ``save_pretrained`` form, or an id such as ``lmsys/vicuna-7b-v1.5``.
        owner: Who asks, for the message.
        patterns: Files that are wanted of a hub's repository.

    Raises:
        WeightsError: They are neither here nor to be had; the message says what fetches them.
    """
    if is_here(source):
        folder = resolve_source(source)
        if not (folder / "config.json").is_file():
            raise WeightsError(f"{owner}: no config.json in {folder}; give a folder written by save_pretrained.")
        return folder
    try:
        fetched = Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        raise WeightsError(_not_here(source, owner)) from error
    if not (fetched / "config.json").is_file():
        raise WeightsError(_not_here(source, owner))
    return fetched


def is_here(source: str) -> bool:
    """Whether a source is a folder here, or can only mean one; else it is an id, ``name`` or ``owner/name``."""
    plain = not source.startswith((ZOO_PREFIX, "/", ".", "~", "\\")) and source.count("/") <= 1
    return not plain or resolve_source(source).is_dir()


def _not_here(source: str, owner: str) -> str:
    return (
        f"{owner}: '{source}' is no folder here and not in the Hugging Face cache {constants.HF_HUB_CACHE}, and the "
        "hub cannot be reached or has no such model; where there is a network, fetch its config.json for `visexpert "
        f"plan` (`hf download {source} config.json`) or all of it for training (`hf download {source}`), or give a "
        "folder written by save_pretrained."
    )
