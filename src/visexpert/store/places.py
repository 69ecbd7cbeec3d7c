"""Where a store lies: a folder, or a URL of fsspec whose files are brought into a folder of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from visexpert.errors import ConfigError, DataError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A store in a folder of this machine, or one that its processes share.

    Args:
        root: The folder.
    """

    root: Path

    @property
    def is_remote(self) -> bool:
        """Whether files are brought here one by one; processes then cannot lock them."""
        return False

    def __str__(self) -> str:
        return str(self.root)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of each finished file of a folder of the store, by name."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            files = [path for path in (self.root / folder).iterdir() if not path.name.startswith(".")]
            return {path.name: path.stat().st_size for path in files if path.is_file()}
        return {}

    def folders(self) -> list[str]:
        """Return the folders of the store."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(path.name for path in self.root.iterdir() if path.is_dir())
        return []

    def bring(self, folder: str, name: str, *, anew: bool = False) -> Path:
        """Return the path of a file on this machine.

        Args:
            folder: Folder in the store.
            name: Name of the file in it.
            anew: Whether to bring it even if it is here.

        Raises:
            DataError: It cannot be brought.
        """
        return self.root / folder / name

    def put(self, folder: str, name: str) -> None:
        """Let other machines have a file that was written here.

        Raises:
            DataError: It cannot be written there.
        """

    def head(self, folder: str, name: str, size: int) -> bytes:
        """Return the first bytes of a file, without the rest.

        Raises:
            DataError: It cannot be read.
        """
        with (self.root / folder / name).open("rb") as file:
            return file.read(size)

    def remove(self, folder: str, name: str) -> None:
        """Remove a file."""
        (self.root / folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Remote(Place):
    """A store at a URL (``s3://``, ``gs://``, ``file://``, ``memory://``, ... whatever fsspec has installed).

    A file is written here, then put under its name. Files that are read are brought once and stay under ``root``.

    Args:
        root: Folder of this machine with the files that were brought or made here.
        url: Where the store lies.
        files: The file system, as fsspec has it.
        base: The URL's path in it.
    """

    url: str
    files: Any
    base: str

    @property
    def is_remote(self) -> bool:
        """Whether files are brought here one by one."""
        return True

    def __str__(self) -> str:
        return self.url

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of each file of a folder; nothing is remembered from the last time."""
        return {name: size for name, kind, size in self._listed(folder) if kind == "file" and not name.startswith(".")}

    def folders(self) -> list[str]:
        """Return the folders of the store."""
        return sorted(name for name, kind, _ in self._listed("") if kind == "directory")

    def bring(self, folder: str, name: str, *, anew: bool = False) -> Path:
        """Return the path of a file on this machine, fetched if it is not here."""
        path = self.root / folder / name
        if path.exists() and not anew:
            return path
        part = path.with_name(f".{name}.{uuid4().hex[:12]}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            self._do(lambda: self.files.get_file(self._at(folder, name), str(part)))
            os.replace(part, path)
        except FileNotFoundError as error:
            raise DataError(f"The feature store {self.url} has no {folder}/{name} anymore; fill it again.") from error
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error}); set store.cache to another folder.") from error
        finally:
            part.unlink(missing_ok=True)
        return path

    def put(self, folder: str, name: str) -> None:
        """Put a file that was written here: under another name first where files can be seen before they are whole."""
        to, part = self._at(folder, name), self._at(folder, f".{name}.{uuid4().hex[:12]}.part")
        whole = getattr(self.files, "protocol", "")
        appears_whole = bool(
            {"s3", "gs", "gcs", "memory"} & {whole, *(whole if isinstance(whole, tuple | list) else ())}
        )

        def put() -> None:
            self.files.makedirs(self._at(folder), exist_ok=True)
            self.files.put_file(str(self.root / folder / name), to if appears_whole else part)
            if not appears_whole:
                self.files.mv(part, to)

        self._do(put)

    def head(self, folder: str, name: str, size: int) -> bytes:
        """Return the first bytes of a file."""
        found: bytes = self._do(lambda: self.files.cat_file(self._at(folder, name), start=0, end=size))
        return found

    def remove(self, folder: str, name: str) -> None:
        """Remove a file there and here."""
        super().remove(folder, name)
        with contextlib.suppress(FileNotFoundError):
            self._do(lambda: self.files.rm_file(self._at(folder, name)))

    def _at(self, *names: str) -> str:
        return "/".join((self.base.rstrip("/"), *(name for name in names if name)))

    def _listed(self, folder: str) -> Iterator[tuple[str, str, int]]:
        try:
            self.files.invalidate_cache()
            found = self._do(lambda: self.files.ls(self._at(folder), detail=True))
        except FileNotFoundError:
            return
        for each in found:
            yield each["name"].rstrip("/").rpartition("/")[2], each["type"], int(each["size"] or 0)

    def _do(self, action: Callable[[], T]) -> T:
        """Run what needs the other side."""
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # storage clients raise many kinds
            told = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(
                f"The feature store {self.url} cannot be used ({told}); check address and access, or set store.folder "
                "to a folder."
            ) from error


def is_url(folder: str) -> bool:
    """Tell whether a store's folder is a URL."""
    return "://" in folder


def place_at(folder: str | Path, cache: Path) -> Place:
    """Return the place of a store.

    Args:
        folder: Its folder or URL.
        cache: Folder of this machine for files of URLs; each URL has a folder of its own in it.

    Raises:
        ConfigError: No file system of fsspec knows the URL's protocol, or its package is missing.
    """
    if not is_url(str(folder)):
        return Place(Path(folder).expanduser())
    url = str(folder).rstrip("/")
    check_url(url)
    import fsspec

    try:
        files, base = fsspec.core.url_to_fs(url, **_OPTIONS.get(url.partition("://")[0], {}))
    except Exception as error:  # of the protocol's own package
        raise ConfigError(
            f"store.folder is {url!r}, which cannot be opened ({type(error).__name__}: {first_line(error)}); "
            "correct it."
        ) from error
    own = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Remote(cache.expanduser() / own, url, files, base)


_OPTIONS = {"s3": {"use_listings_cache": False}, "gs": {"use_listings_cache": False}}


def check_url(url: str) -> None:
    """Check that fsspec can read and write at a URL, without going there.

    Raises:
        ConfigError: Its protocol is unknown, or the package for it is missing.
    """
    from fsspec.registry import get_filesystem_class

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(
            f"store.folder is {url!r}, but {protocol!r} is not a protocol that fsspec knows; use a folder, "
            "s3://, gs:// or file://."
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"store.folder is {url!r}, which needs a package that is not installed ({first_line(error)}): "
            "pip install 'visexpert[remote]' for s3:// and gs://."
        ) from error
