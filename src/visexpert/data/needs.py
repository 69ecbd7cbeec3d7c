"""Files, folders and tokenizers that a source needs on disk, and messages about those that are missing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

from visexpert.errors import ConfigError, DataError, WeightsError, require_package
from visexpert.io.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Need:
    """A required file or folder.

    Args:
        path: Its path.
        what: What it is.
        url: Where it comes from.
        size: Approximate size of the download.
        others: Alternative paths.
    """

    path: Path
    what: str
    url: str
    size: str
    others: tuple[Path, ...] = ()

    @property
    def found(self) -> Path | None:
        """The path at which it exists, if any."""
        return next((path for path in (self.path, *self.others) if path.exists()), None)

    @property
    def sentence(self) -> str:
        """What is missing, where it was looked for, and where to get it."""
        places = " or ".join(map(str, (self.path, *self.others)))
        return f"{self.what} should be at {places}; get it from {self.url} ({self.size})."


@dataclass(frozen=True)
class TokenizerNeed:
    """A required tokenizer.

    Args:
        name: Name of the tokenizer in any form of :meth:`~visexpert.io.source.ModelSource.parse`.
    """

    name: str

    @property
    def found(self) -> Path | None:
        """One of its files, if it is on this machine."""
        found = find_tokenizer(self.name)
        return found if isinstance(found, Path) else None

    @property
    def sentence(self) -> str:
        """What is missing, where it was looked for, and how to get it."""
        return str(find_tokenizer(self.name))


@dataclass(frozen=True)
class DatasetNeed:
    """A required data set.

    Args:
        name: A folder, ``ORG/NAME``, or ``hf:ORG/NAME@REVISION``.

    Raises:
        ConfigError: ``hf:`` is not followed by an id.
    """

    name: str
    size = "size unknown"

    def __post_init__(self) -> None:
        self._source()

    @property
    def what(self) -> str:
        """What it is."""
        return f"The data set {self.name}"

    @property
    def found(self) -> Path | None:
        """Its folder, if it is on this machine."""
        source = self._source()
        if source.path is not None:
            return source.path if source.path.is_dir() else None
        try:
            return Path(
                snapshot_download(
                    str(source.repo), repo_type="dataset", revision=source.revision, local_files_only=True
                )
            )
        except (OSError, HFValidationError):  # LocalEntryNotFoundError is an OSError
            return None

    @property
    def sentence(self) -> str:
        """What is missing, where it was looked for, and how to get it."""
        source = self._source()
        if source.path is not None:
            return f"The data set should be a folder at {source.path}; correct the path, or name ORG/NAME of the Hub."
        revision = f" --revision {source.revision}" if source.revision else ""
        plain = "" if self.name.startswith("hf:") else f"There is no folder '{self.name}', and "
        the = "the" if plain else "The"
        return (
            f"{plain}{the} data set '{source.repo}' is not in the cache {constants.HF_HUB_CACHE}; fetch it on a "
            f"machine with a network with `hf download --repo-type dataset {source.repo}{revision}`, or name a folder."
        )

    def _source(self) -> ModelSource:
        try:
            return ModelSource.parse(self.name)
        except WeightsError as error:
            raise ConfigError(
                f"root is {self.name!r}, but must be a folder, ORG/NAME, or hf:ORG/NAME@REVISION."
            ) from error


AnyNeed: TypeAlias = Need | TokenizerNeed | DatasetNeed


def require(needs: Iterable[AnyNeed], *, source: str) -> None:
    """Check that nothing is missing.

    Raises:
        DataError: A file or folder is missing.
        WeightsError: The tokenizer is missing.
    """
    missing = [need for need in needs if need.found is None]
    if not missing:
        return
    first, more = missing[0], len(missing) - 1
    verb = "is" if more == 1 else "are"
    rest = f" ({more} more {verb} missing; visexpert data check CONFIG lists all)" if more else ""
    error = WeightsError if isinstance(first, TokenizerNeed) else DataError
    raise error(f"{source}: {first.sentence.rstrip('.')}{rest}.")


def missing_images(paths: Sequence[str]) -> list[str]:
    """Return the image files that do not exist; each folder is listed once instead of checking every file."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    missing = []
    for folder, files in by_folder.items():
        if len(files) > 64 and os.path.isdir(folder):
            there = set(os.listdir(folder))
            missing += [path for path in files if os.path.basename(path) not in there]
        else:
            missing += [path for path in files if not os.path.isfile(path)]
    return missing


FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A tokenizer has at least one of these files."""


def find_tokenizer(name: str) -> Path | WeightsError:
    """Return a file of a tokenizer if it is on this machine, otherwise an error that says what is missing."""
    try:
        source = ModelSource.parse(name)
    except WeightsError as error:
        return error
    return source.find(*FILES) or source.absent(*FILES, owner="tokenizer")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer without downloading anything or running code from it.

    Args:
        name: Name of the tokenizer in any form of :meth:`~visexpert.io.source.ModelSource.parse`; files of the Hugging
            Face Hub must be in the local cache.

    Raises:
        WeightsError: There is none, or it is damaged.
        ConfigError: A package that reads it is not installed.
    """
    from transformers import AutoTokenizer

    found = find_tokenizer(name)
    if isinstance(found, WeightsError):
        raise found
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            found.parent, local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds on damaged files
        if (found.parent / "tokenizer.model").is_file() and not (found.parent / "tokenizer.json").is_file():
            require_package("sentencepiece", extra="vicuna", what=f"The tokenizer {name} (tokenizer.model)")
        raise WeightsError(
            f"The tokenizer {name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]}); "
            "fetch it again or name another."
        ) from error
    return tokenizer
