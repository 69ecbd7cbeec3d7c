"""Where the files of a published model are: on this machine, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import Tensor

from visexpert.errors import WeightsError
from visexpert.io import reading
from visexpert.io.weights import load_state, resolve_source

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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})


@dataclass(frozen=True)
class LoadedState:
    """Weights and the file that they were read from, for messages.

    Args:
        path: The file; of a split one, its index.
        tensors: By name.
    """

    path: Path
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelSource:
    """Files of a published model. Looking for them never downloads, :meth:`fetch` may.

    Args:
        text: As the user wrote it.
        path: Folder or weights file on this machine; None for a repository.
        repo: Id of the hub's repository; None for a path.
        revision: Branch, tag or commit of the repository; None for its main branch.
    """

    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Read ``zoo:NAME``, a path, or a hub id ``ORG/NAME``, ``hf:ORG/NAME`` or ``hf:ORG/NAME@REVISION``.

        A plain ``ORG/NAME`` that exists on this machine is a path. open_clip's and timm's ``hf-hub:`` means the same as
        ``hf:``; what follows their ``local-dir:`` is a path.

        Raises:
            WeightsError: What follows ``hf:`` is no id.
        """
        if text.startswith(FOLDER_PREFIX):
            return cls(text, path=resolve_source(text.removeprefix(FOLDER_PREFIX)))
        prefix = next((each for each in HUB_PREFIXES if text.startswith(each)), "")
        name = text.removeprefix(prefix)
        path = resolve_source(name)
        hub = _HUB_ID.fullmatch(name) is not None
        if prefix and not hub:
            raise WeightsError(f"'{text}' names no model of the hub; after '{prefix}' comes ORG/NAME.")
        if hub and (prefix or not path.exists()) and path.suffix not in _SUFFIXES:
            repo, _, revision = name.partition("@")
            return cls(text, repo=repo, revision=revision or None)
        return cls(text, path=path)

    @property
    def file(self) -> Path | None:
        """The weights file, where the source is one (by its suffix) and no folder or repository."""
        return self.path if self.path is not None and self.path.suffix in _SUFFIXES else None

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
            except (EntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
                reason = error
        raise self.absent(*names, owner=owner) from reason

    def read_json(self, *names: str, owner: str) -> dict[str, Any] | None:
        """The JSON object in the first of these files that is on this machine; None where none is.

        Raises:
            WeightsError: The file cannot be read, or holds something else.
        """
        path = None if self.file is not None else self.find(*names)
        return None if path is None else read_json(path, owner=owner)

    def state(self, *names: str, owner: str, holding: re.Pattern[str] | None = None) -> LoadedState:
        """Weights of the first of these files, all parts of a split one together.

        Args:
            names: Files, best first.
            owner: Who asks, for messages.
            holding: Of a split one, read those parts alone that list a weight of such a name; all where none does.

        Raises:
            WeightsError: They are nowhere, damaged, or an index names a file outside its folder.
        """
        path = self.file or self.fetch(*names, owner=owner)
        if path.suffix != ".json":
            return LoadedState(path, load_state(path, owner=owner))
        tensors: dict[str, Tensor] = {}
        for part in self.parts(path, owner=owner, holding=holding):
            tensors |= load_state(self.fetch(part, owner=owner), owner=owner)
        return LoadedState(path, tensors)

    def parts(self, index: Path, *, owner: str, holding: re.Pattern[str] | None = None) -> list[str]:
        """Names of the files that an index (``*.index.json``) lists; of those that hold such weights, if any do.

        Raises:
            WeightsError: It lists none, or one outside its own folder.
        """
        listed = read_json(index, owner=owner).get("weight_map")
        listed = listed if isinstance(listed, dict) else {}
        names = sorted({str(name) for name in listed.values()})
        if not names or any(Path(name).name != name for name in names):
            raise WeightsError(f"{owner}: {index} lists the files {names[:3]}; names in its own folder are needed.")
        wanted = {str(name) for key, name in listed.items() if holding is not None and holding.search(str(key))}
        return sorted(wanted) or names

    def licence(self) -> str | None:
        """The licence that the model card (``README.md``) states, where the card is on this machine."""
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
        if self.repo is None:
            return WeightsError(
                f"{owner}: cannot read {(self.path or Path()) / names[0]} (there is no such file); give a folder "
                "written by save_pretrained, or the id of a model on the hub."
            )
        off = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub did not give it"
        revision = f" --revision {self.revision}" if self.revision else ""
        return WeightsError(
            f"{owner}: {names[0]} of '{self.repo}' is not in the cache {constants.HF_HUB_CACHE} and {off}; fetch it "
            f"where there is a network with `hf download {self.repo}{revision}`, or give a folder."
        )


def read_json(path: Path, *, owner: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: The file is missing or no JSON object.
    """
    try:
        loaded = reading.read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{owner}: cannot read {path} ({error}); give a folder written by save_pretrained, or zoo:clip."
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{owner}: {path} holds a {type(loaded).__name__}, a JSON object is needed.")
    return loaded
