"""Where the files of a published model or tokenizer are: on this machine, or in a repository of the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from visexpert.errors import WeightsError
from visexpert.io.reading import read_object

ZOO = Path(__file__).parents[1] / "tabletop" / "zoo" / "weights"
"""Folder of the shipped weights."""

ZOO_PREFIX = "zoo:"

HUB_PREFIX = "hf:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:", HUB_PREFIX)
"""What may stand before a hub id; the longer ones are open_clip's and timm's."""

FOLDER_PREFIX = "local-dir:"
"""What open_clip and timm put before a folder."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names under which transformers and timm publish weights, best first; an index names the parts of a split file."""

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""All that is needed to build a model and its tokenizer, without weights."""

FETCH_AGAIN = "fetch it again, or give another folder"

_HUB_ID = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9](?:[\w.-]*\w)?/)?(?=[\w.-]{1,96}(?:@|$))[A-Za-z0-9](?:[\w.-]*\w)?)(?<!\.git)"
    r"(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?"
)
_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})
_NOT_TO_BE_HAD = (EntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError)


@dataclass(frozen=True)
class ModelSource:
    """Files of a published model or tokenizer. Looking for them never downloads; :meth:`fetch` may.

    Args:
        text: As the user wrote it.
        path: Folder or weights file on this machine; None for a repository.
        repo: Id of the hub's repository; None for a path.
        revision: Branch, tag, pull request or commit of the repository; None for its main branch.
    """

    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Read ``zoo:NAME``, a path, or a hub id ``ORG/NAME``, ``hf:ORG/NAME`` or ``hf:ORG/NAME@REVISION``.

        A plain ``ORG/NAME`` that exists on this machine is a path. open_clip's and timm's ``hf-hub:`` means the same as
        ``hf:``; what follows their ``local-dir:`` is a path. Early repositories of the hub have no ``ORG/``.

        Raises:
            WeightsError: What follows ``hf:`` is no id, or what follows ``zoo:`` is no plain name.
        """
        if text.startswith((FOLDER_PREFIX, ZOO_PREFIX)):
            return cls(text, path=local_path(text))
        prefix = next((each for each in HUB_PREFIXES if text.startswith(each)), "")
        name = text.removeprefix(prefix)
        path = local_path(name)
        if not prefix and (path.exists() or path.suffix in _SUFFIXES):
            return cls(text, path=path)
        hub = None if ".." in name or "--" in name.partition("@")[0] else _HUB_ID.fullmatch(name.rstrip("/"))
        if hub is not None:
            return cls(text, repo=hub["repo"], revision=hub["revision"])
        if prefix:
            raise WeightsError(
                f"'{text}' names no model of the hub; after '{prefix}' comes ORG/NAME, or ORG/NAME@REVISION with a "
                "branch, tag or commit."
            )
        return cls(text, path=path)

    @property
    def file(self) -> Path | None:
        """The weights file, where the source is one (by its suffix) and no folder or repository."""
        return self.path if self.path is not None and self.path.suffix in _SUFFIXES else None

    @property
    def fetched_by(self) -> str:
        """The command that fetches the repository where there is a network."""
        return f"`hf download {self.repo}{f' --revision {self.revision}' if self.revision else ''}`"

    def find(self, *names: str) -> Path | None:
        """The first of these files that is on this machine."""
        if self.path is not None:
            return next((self.path / name for name in names if (self.path / name).is_file()), None)
        for name in names:
            found = try_to_load_from_cache(str(self.repo), name, revision=self.revision)
            if isinstance(found, str):
                return Path(found)
        return None

    def fetch(self, *names: str, owner: str) -> Path:
        """The first of these files that is on this machine or, unless the hub is switched off, on the hub.

        Raises:
            WeightsError: It is nowhere; the message says where it was looked for and what fetches it.
        """
        found = self.find(*names)
        if found is not None:
            return found
        reason: Exception | None = None
        for name in names if self.repo is not None else ():
            try:
                return Path(hf_hub_download(str(self.repo), name, revision=self.revision))
            except _NOT_TO_BE_HAD as error:
                reason = error
        raise self.absent(*names, owner=owner) from reason

    def fetch_weights(self, *, owner: str, names: Sequence[str] = WEIGHT_FILES) -> Path:
        """The file of weights as :meth:`fetch` finds it; of split ones the index, once all parts are here.

        Raises:
            WeightsError: The file or a part is nowhere, or the index lists files outside its folder.
        """
        path = self.file or self.fetch(*names, owner=owner)
        if path.suffix == ".json":
            for part in self.parts(path, owner=owner):
                self.fetch(part, owner=owner)
        return path

    def folder(self, name: str, *, owner: str) -> Path:
        """The folder with a model's file ``name``; of a repository that is not here, with all :data:`SMALL_FILES`.

        Raises:
            WeightsError: As :meth:`fetch`.
        """
        if self.repo is not None and self.find(name) is None:
            try:
                snapshot_download(self.repo, revision=self.revision, allow_patterns=list(SMALL_FILES))
            except _NOT_TO_BE_HAD as error:
                raise self.absent(name, owner=owner) from error
        return self.fetch(name, owner=owner).parent

    def read_json(self, *names: str, owner: str) -> dict[str, Any] | None:
        """The JSON object in the first of these files that is on this machine; None where none is.

        Raises:
            WeightsError: The file cannot be read, or holds something else.
        """
        path = None if self.file is not None else self.find(*names)
        return None if path is None else read_object(path, error=WeightsError, owner=owner, step=FETCH_AGAIN)

    def parts(self, index: Path, *, owner: str, holding: re.Pattern[str] | None = None) -> list[str]:
        """Names of the files that an index (``*.index.json``) lists; of those that hold such weights, if any do.

        Raises:
            WeightsError: It lists none, or one outside its own folder.
        """
        listed = read_object(index, error=WeightsError, owner=owner, step=FETCH_AGAIN).get("weight_map")
        listed = listed if isinstance(listed, dict) else {}
        names = sorted({str(name) for name in listed.values()})
        if not names or any(Path(name).name != name for name in names):
            raise WeightsError(f"{owner}: {index} lists the files {names[:3]}; names in its own folder are needed.")
        wanted = {str(name) for key, name in listed.items() if holding is not None and holding.search(str(key))}
        return sorted(wanted) or names

    def license(self) -> str | None:
        """The license that the model card (``README.md``) states, where the card is on this machine."""
        card = None if self.file is not None else self.find("README.md")
        if card is None:
            return None
        try:
            data = ModelCard.load(card).data
        except ValueError:  # no or a broken header
            return None
        stated = data.get("license")
        return str(data.get("license_name") or stated) if stated == "other" else stated

    def absent(self, *names: str, owner: str) -> WeightsError:
        """The error for files that are nowhere: what was looked for, where, and what fetches it."""
        wanted = " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
        if self.path is not None:
            if self.path.is_dir():
                what = f"no {wanted} in {self.path}"
            elif self.path.exists():
                what = f"{self.path} is a file, but a folder with {wanted} is needed"
            else:
                what = f"there is no {self.path}"
            instead = "give a folder written by save_pretrained, or the id of a model on the hub"
            if self.text.startswith(ZOO_PREFIX):
                instead = f"shipped entries are {zoo_names()}"
            return WeightsError(f"{owner}: {what}; {instead}.")
        off = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub did not give it"
        plain = f"'{self.text}' is no folder here, and " if self.text.startswith(str(self.repo)) else ""
        at = f" at revision '{self.revision}'" if self.revision else ""
        planned = " (for `visexpert plan`, config.json alone)" if "config.json" in names else ""
        return WeightsError(
            f"{owner}: {plain}{wanted} of '{self.repo}'{at} is not in the cache {constants.HF_HUB_CACHE} and {off}; "
            f"fetch it where there is a network with {self.fetched_by}{planned}, or give a folder."
        )


def local_path(text: str | Path) -> Path:
    """The path that ``zoo:NAME``, ``local-dir:PATH`` or a path means; it need not exist.

    A shipped entry is a folder, or a file whose suffix ``.safetensors`` may be left out.

    Raises:
        WeightsError: What follows ``zoo:`` is no plain name.
    """
    text = str(text)
    if not text.startswith(ZOO_PREFIX):
        return Path(text.removeprefix(FOLDER_PREFIX)).expanduser()
    name = text.removeprefix(ZOO_PREFIX)
    if not name or Path(name).name != name:
        raise WeightsError(f"'{text}' is no zoo entry: after 'zoo:' comes a plain name, one of {zoo_names()}.")
    file = ZOO / f"{name}.safetensors"
    return file if file.is_file() and not (ZOO / name).exists() else ZOO / name


def zoo_names() -> list[str]:
    """Names of the shipped entries, sorted."""
    return sorted(
        {entry.name.removesuffix(".safetensors") for entry in ZOO.glob("*") if not entry.name.startswith(".")}
    )
