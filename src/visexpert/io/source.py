"""Sources of models and tokenizers: files on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from visexpert.errors import WeightsError
from visexpert.io.reading import check_unpacked, read_object

ZOO = Path(__file__).parents[1] / "tabletop" / "zoo" / "weights"
"""Folder of the shipped weights."""

ZOO_PREFIX = "zoo:"

HF_PREFIX = "hf:"
HF_PREFIXES = ("hf-hub:", "hf_hub:", HF_PREFIX)
"""Prefixes of a Hugging Face id; the longer ones are open_clip's and timm's."""

FOLDER_PREFIX = "local-dir:"
"""Prefix of a folder in open_clip and timm."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weights files in transformers and timm, best first; an index lists the parts of a split file."""

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of the files that build a model and its tokenizer without weights."""

FETCH_AGAIN = "fetch it again, or use another folder"

_REPO_ID = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9](?:[\w.-]*\w)?/)?(?=[\w.-]{1,96}(?:@|$))[A-Za-z0-9](?:[\w.-]*\w)?)(?<!\.git)"
    r"(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?"
)
_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})
_NOT_FETCHED = (EntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError)


@dataclass(frozen=True)
class ModelSource:
    """Files of a published model or tokenizer. :meth:`find` never downloads; :meth:`fetch` may.

    Args:
        text: Source as the user wrote it.
        path: Folder or weights file on this machine; None for a repository.
        repo: Id of a repository on the Hugging Face Hub; None for a path.
        revision: Branch, tag, pull request or commit of the repository; None for its main branch.
    """

    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Parse ``zoo:NAME``, a path, or a Hugging Face id: ``ORG/NAME``, ``hf:ORG/NAME``, ``hf:ORG/NAME@REVISION``.

        A plain ``ORG/NAME`` that exists on this machine is a path. open_clip's and timm's ``hf-hub:`` means the same as
        ``hf:``, and a path follows their ``local-dir:``. The oldest repositories have no ``ORG/``.

        Raises:
            WeightsError: ``hf:`` is not followed by an id, or ``zoo:`` not by a plain name.
        """
        if text.startswith((FOLDER_PREFIX, ZOO_PREFIX)):
            return cls(text, path=local_path(text))
        prefix = next((each for each in HF_PREFIXES if text.startswith(each)), "")
        name = text.removeprefix(prefix)
        path = local_path(name)
        if not prefix and (path.exists() or path.suffix in _SUFFIXES):
            return cls(text, path=path)
        found = None if ".." in name or "--" in name.partition("@")[0] else _REPO_ID.fullmatch(name.rstrip("/"))
        if found is not None:
            return cls(text, repo=found["repo"], revision=found["revision"])
        if prefix:
            raise WeightsError(
                f"'{text}' is not a model on the Hugging Face Hub; write {prefix}ORG/NAME, or "
                f"{prefix}ORG/NAME@REVISION with a branch, tag or commit."
            )
        return cls(text, path=path)

    @property
    def file(self) -> Path | None:
        """The weights file if the source is one, by its suffix; None for a folder or repository."""
        return self.path if self.path is not None and self.path.suffix in _SUFFIXES else None

    @property
    def fetched_by(self) -> str:
        """The command that fetches the repository, on a machine with a network."""
        return f"`hf download {self.repo}{f' --revision {self.revision}' if self.revision else ''}`"

    def find(self, *names: str) -> Path | None:
        """Return the first of these files that is on this machine; None if none is."""
        if self.path is not None:
            return next((self.path / name for name in names if (self.path / name).is_file()), None)
        for name in names:
            found = try_to_load_from_cache(str(self.repo), name, revision=self.revision)
            if isinstance(found, str):
                return Path(found)
        return None

    def fetch(self, *names: str, owner: str) -> Path:
        """Return the first of these files on this machine, or else download one from the Hugging Face Hub.

        Raises:
            WeightsError: None is available; the message says where they were looked for and how to fetch them.
        """
        found = self.find(*names)
        if found is not None:
            return found
        reason: Exception | None = None
        for name in names if self.repo is not None else ():
            try:
                return Path(hf_hub_download(str(self.repo), name, revision=self.revision))
            except _NOT_FETCHED as error:
                reason = error
        raise self.absent(*names, owner=owner) from reason

    def fetch_weights(self, *, owner: str, names: Sequence[str] = WEIGHT_FILES) -> Path:
        """Return the weights file as :meth:`fetch` does; for a split one, fetch all parts and return the index.

        Raises:
            WeightsError: The file or a part is not available or damaged, or the index lists files outside its folder.
        """
        path = self.file or self.fetch(*names, owner=owner)
        files = [path]
        if path.suffix == ".json":
            files = [self.fetch(part, owner=owner) for part in self.parts(path, owner=owner)]
        for file in files:
            try:
                check_unpacked(file)
            except (OSError, ValueError) as error:
                raise WeightsError(f"{owner}: {file} cannot be read ({error}); {FETCH_AGAIN}.") from error
        return path

    def folder(self, name: str, *, owner: str) -> Path:
        """Return the folder with a model's file ``name``; if it is not here, download all :data:`SMALL_FILES`.

        Raises:
            WeightsError: The file is not available.
        """
        if self.repo is not None and self.find(name) is None:
            try:
                snapshot_download(self.repo, revision=self.revision, allow_patterns=list(SMALL_FILES))
            except _NOT_FETCHED as error:
                raise self.absent(name, owner=owner) from error
        return self.fetch(name, owner=owner).parent

    def read_json(self, *names: str, owner: str) -> dict[str, Any] | None:
        """Return the JSON object in the first of these files that is on this machine; None if none is.

        Raises:
            WeightsError: The file cannot be read, or is not a JSON object.
        """
        path = None if self.file is not None else self.find(*names)
        return None if path is None else read_object(path, error=WeightsError, owner=owner, step=FETCH_AGAIN)

    def parts(self, index: Path, *, owner: str, holding: re.Pattern[str] | None = None) -> list[str]:
        """Return the names of the files in an index (``*.index.json``).

        Args:
            index: Path of the index.
            owner: Name of the caller, for the message.
            holding: Only files with a weight whose name matches; all if none does.

        Raises:
            WeightsError: It lists no file, or one outside its own folder.
        """
        listed = read_object(index, error=WeightsError, owner=owner, step=FETCH_AGAIN).get("weight_map")
        listed = listed if isinstance(listed, dict) else {}
        names = sorted({str(name) for name in listed.values()})
        if not names or any(Path(name).name != name for name in names):
            raise WeightsError(
                f"{owner}: {index} lists the files {names[:3]}, but must list files in its own folder; {FETCH_AGAIN}."
            )
        wanted = {str(name) for key, name in listed.items() if holding is not None and holding.search(str(key))}
        return sorted(wanted) or names

    def license(self) -> str | None:
        """Return the license in the model card (``README.md``); None if there is none, or no card on this machine."""
        card = None if self.file is not None else self.find("README.md")
        if card is None:
            return None
        try:
            data = ModelCard.load(card).data
        except ValueError:  # the header is missing or broken
            return None
        stated = data.get("license")
        return str(data.get("license_name") or stated) if stated == "other" else stated

    def absent(self, *names: str, owner: str) -> WeightsError:
        """Return the error for missing files: what was looked for, where, and how to fetch it."""
        wanted = " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
        if self.path is not None:
            if self.path.is_dir():
                what = f"no {wanted} in {self.path}"
            elif self.path.exists():
                what = f"{self.path} is a file, but a folder with {wanted} is needed"
            else:
                what = f"there is no {self.path}"
            instead = "use a folder written by save_pretrained, or the id of a model on the Hugging Face Hub"
            if self.text.startswith(ZOO_PREFIX):
                instead = f"shipped entries are {zoo_names()}"
            return WeightsError(f"{owner}: {what}; {instead}.")
        offline = "downloads are switched off (HF_HUB_OFFLINE)"
        off = offline if constants.HF_HUB_OFFLINE else "could not be downloaded from the Hugging Face Hub"
        plain = f"there is no folder '{self.text}', and " if self.text.startswith(str(self.repo)) else ""
        at = f" at revision '{self.revision}'" if self.revision else ""
        planned = " (for `visexpert plan`, config.json alone)" if "config.json" in names else ""
        return WeightsError(
            f"{owner}: {plain}{wanted} of '{self.repo}'{at} is not in the cache {constants.HF_HUB_CACHE}, and {off}; "
            f"fetch it on a machine with a network with {self.fetched_by}{planned}, or use a folder."
        )


def local_path(text: str | Path) -> Path:
    """Return the path for ``zoo:NAME``, ``local-dir:PATH`` or a path; it need not exist.

    An entry of the zoo is a folder, or a file whose suffix ``.safetensors`` may be left out.

    Raises:
        WeightsError: ``zoo:`` is not followed by a plain name.
    """
    text = str(text)
    if not text.startswith(ZOO_PREFIX):
        return Path(text.removeprefix(FOLDER_PREFIX)).expanduser()
    name = text.removeprefix(ZOO_PREFIX)
    if not name or Path(name).name != name:
        raise WeightsError(f"'{text}' is not in the zoo; write zoo:NAME with one of {zoo_names()}.")
    file = ZOO / f"{name}.safetensors"
    return file if file.is_file() and not (ZOO / name).exists() else ZOO / name


def zoo_names() -> list[str]:
    """Return the names of the shipped entries, sorted."""
    return sorted(
        {entry.name.removesuffix(".safetensors") for entry in ZOO.glob("*") if not entry.name.startswith(".")}
    )
