"""Data sets of Hugging Face's ``datasets``, read row by row from Arrow files that stay on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import DatasetCard

from visexpert.data.annotations import BROKEN, BrokenRecordError, image_path, kind_of
from visexpert.data.columns import ColumnData, Columns
from visexpert.data.needs import DatasetNeed, Need
from visexpert.data.packing import IntArray
from visexpert.data.samples import Sample, file_facts
from visexpert.errors import ConfigError, DataError, first_line, require_package
from visexpert.io.reading import read_json, read_yaml
from visexpert.io.weights import cache_root
from visexpert.typed import typed

if TYPE_CHECKING:
    from datasets import Dataset

_SINGLE = "train"
"""What the only split of a saved set is called."""


@typed
class HuggingFaceData(ColumnData):
    """A data set of Hugging Face's ``datasets`` (extra ``datasets``), with an image in one column.

    ``root`` is a folder that ``save_to_disk`` wrote (of one set, or of several splits), a folder as on the Hugging Face
    Hub (Parquet files, or whatever ``load_dataset`` reads without code), or the id of a data set on the Hub, which is
    read from the local cache and never downloaded. Rows stay on disk until they are due; workers decode the images.
    Parquet files are converted once, into ``VISEXPERT_CACHE``.

    Args:
        root: The folder, ``ORG/NAME``, or ``hf:ORG/NAME@REVISION``.
        subset: Configuration of a data set that has several; null for its default.
        train: Split to train on, as ``val`` and ``test`` are splits; a folder of one saved set has the split ``train``.
        kwargs: See :class:`~visexpert.data.columns.ColumnData`. The column of images is of type ``Image``, bytes, or
            the name of a file under ``root``.
    """

    has_files = False

    def __init__(self, *, root: str, subset: str | None = None, train: str = "train", **kwargs: Any) -> None:
        super().__init__(root=root, train=train, **kwargs)
        require_package("datasets", extra="datasets", what="HuggingFaceData")
        self.subset = subset
        self.place = DatasetNeed(root)

    def needs(self, part: str) -> list[Need | DatasetNeed]:
        """List the folder or the data set of the Hub."""
        return [self.place]

    def prepare_data(self) -> None:
        """Convert Parquet files (once per machine)."""
        super().prepare_data()
        for part in self.parts_of_stage(None):
            self.open(part)

    def read(self, part: str) -> Iterable[Sample]:
        """Yield all samples of a part."""
        return self.table(part)

    def open(self, part: str) -> None:
        """Open the Arrow files of a part, once.

        Raises:
            DataError: There is no such split or column, a column is of another type, or the files are damaged.
        """
        if part in self._tables:
            return
        name, folder = self.named[part], self.folder
        where = f"{self.called}: the split {name!r} of {self.place.name}"
        data = _split(folder, name, self.subset, owner=self.called)
        if not len(data):
            raise DataError(f"{where} has no rows; name another split.")
        self.columns.check(list(data.features), where=where)
        _check_types(data.features, self.columns, where=where)
        data = _raw(data, self.columns)
        label = self.columns.label
        if label is not None:
            names = getattr(data.features[label], "names", None)
            found = [str(value if names is None or value is None else names[value]) for value in data.unique(label)]
            self.check_labels(found, where=f"the split {name!r}")
        for name_of_part, rows in self.rows_in_use(part, len(data)).items():
            self._tables[name_of_part] = ArrowRows(data, rows, self.columns, folder=folder, split=name)

    @property
    def folder(self) -> Path:
        """The folder of the files.

        Raises:
            DataError: It is missing.
        """
        if (found := self.place.found) is None:
            raise DataError(f"{self.called}: {self.place.sentence}")
        return found


class ArrowRows:
    """Rows of a data set, read when they are due (:class:`~visexpert.data.samples.Rows`).

    Args:
        data: The data set, with images as they are stored.
        rows: int64, the rows in use.
        columns: Its columns.
        folder: Folder of its files.
        split: Name of the split, for messages.
    """

    def __init__(self, data: Dataset, rows: IntArray, columns: Columns, *, folder: Path, split: str) -> None:
        self._data, self._rows, self._columns = data, rows, columns
        self._folder, self._split = folder, split
        feature = None if columns.label is None else data.features[columns.label]
        self._classes: list[str] | None = getattr(feature, "names", None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        key, columns = self.key(row), self._columns
        try:
            record = self._data[int(self._rows[row])]
            if columns.label is not None and self._classes is not None:
                record[columns.label] = _class_of(record[columns.label], self._classes, name=columns.label)
            item, label = columns.item_of(record), columns.label_of(record)
            file, content = self._image(record[columns.image])
        except (*BROKEN, OSError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(f"{key} of {self._folder} is broken ({first_line(error)}).") from error
        return Sample(key, file or key, () if item is None else (item,), label=label, content=content)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def key(self, row: int) -> str:
        """Return the place of a row in its split."""
        return f"{self._split}[{int(self._rows[row])}]"

    def identity(self) -> Iterator[str]:
        """Yield the data set's own fingerprint, its Arrow files with size and modification time, and the rows."""
        yield str(self._data._fingerprint)
        for file in self._data.cache_files:
            yield f"{file['filename']}\0{file_facts(file['filename'])}"
        yield self._columns.image
        yield np.asarray(self._rows, dtype=np.int64).tobytes().hex()

    def _image(self, value: Any) -> tuple[str, bytes | None]:
        """Return the path of an image, or its bytes.

        Raises:
            BrokenRecordError: There is neither, or the path leads out of the folder.
        """
        name = self._columns.image
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(content, bytes):
            return "", content
        path = content if isinstance(content, str) else path
        if not isinstance(path, str):
            raise BrokenRecordError(f"{name} is {kind_of(path)}, but must be an image")
        if "::" in path:
            raise BrokenRecordError(f"{name} lies in an archive, {path}; unpack it")
        above = (base for base in (self._folder.absolute(), self._folder.resolve()) if Path(path).is_relative_to(base))
        inner = next((str(Path(path).relative_to(base)) for base in above), path)
        return image_path(self._folder, inner, key=name), None


def _class_of(value: Any, classes: Sequence[str], *, name: str) -> str:
    if not isinstance(value, int) or not 0 <= value < len(classes):
        raise BrokenRecordError(f"{name} is {kind_of(value)}, which is none of the {len(classes)} classes")
    return classes[value]


def _split(folder: Path, name: str, subset: str | None, *, owner: str) -> Dataset:
    """Open a split of a folder.

    Raises:
        DataError: There is no such split, or the files are damaged.
        ConfigError: There is no such subset.
    """
    try:
        known = _splits(folder, subset)
        if name in known:
            return known[name]()
    except DataError:
        raise
    except Exception as error:  # pyarrow and the builders of datasets raise many kinds
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            names = ", ".join(_subsets(folder))
            raise ConfigError(
                f"{owner}: subset is {subset!r}, but {folder} has {names}; set it to one of them."
            ) from error
        raise DataError(
            f"{owner}: {folder} cannot be read as a data set ({type(error).__name__}: {first_line(error)}); name a "
            "folder that save_to_disk wrote or that holds Parquet files, or write it again."
        ) from error
    raise DataError(f"{owner}: {folder} has no split {name!r}, only {', '.join(known)}; name one of them.")


def _splits(folder: Path, subset: str | None) -> Mapping[str, Callable[[], Dataset]]:
    """Return how each split of a folder is opened."""
    from datasets import DownloadConfig, load_dataset

    if (folder / "state.json").is_file():
        return {_SINGLE: _opener(folder)}
    if (folder / "dataset_dict.json").is_file():
        listed = read_json(folder / "dataset_dict.json")["splits"]
        return {name: _opener(folder / name) for name in listed if Path(name).name == name}
    _refuse_elsewhere(folder)
    loaded = load_dataset(
        str(folder),
        name=subset,
        cache_dir=str(cache_root() / "datasets"),
        download_config=DownloadConfig(local_files_only=True),
    )
    return {name: _keep(data) for name, data in loaded.items()}


def _refuse_elsewhere(folder: Path) -> None:
    """Check that the data card names no files outside the folder, which ``datasets`` would read or download.

    Raises:
        DataError: It does.
    """
    card, beside = folder / "README.md", folder / ".huggingface.yaml"
    said = DatasetCard.load(card).data.to_dict().get("configs") if card.is_file() else None
    for name in _strings([said, read_yaml(beside) if beside.is_file() else None]):
        if "://" in name or "::" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"{card} names data at {name}, outside of its folder; fetch the files and correct the card."
            )


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _subsets(folder: Path) -> list[str]:
    from datasets import get_dataset_config_names

    return list(get_dataset_config_names(str(folder)))


def _opener(folder: Path) -> Callable[[], Dataset]:
    from datasets import Dataset

    return lambda: Dataset.load_from_disk(str(folder))


def _keep(data: Dataset) -> Callable[[], Dataset]:
    return lambda: data


def _raw(data: Dataset, columns: Columns) -> Dataset:
    """Return the columns that are read, with images as they are stored: workers decode them."""
    from datasets import Image

    data = data.with_format(None).select_columns(list(dict.fromkeys(columns.read.values())))
    is_image = isinstance(data.features[columns.image], Image)
    return data.cast_column(columns.image, Image(decode=False)) if is_image else data


def _check_types(features: Mapping[str, Any], columns: Columns, *, where: str) -> None:
    """Check that each column holds what it is read for.

    Raises:
        DataError: One does not.
    """
    wanted = {
        "image_column": (_holds_image, "images, their bytes or names of their files"),
        "label_column": (_holds_class, "classes: names or whole numbers"),
    }
    for setting, column in columns.read.items():
        fits, what = wanted.get(setting, (_holds_text, "text"))
        if not fits(features[column]):
            fitting = ", ".join(name for name, feature in features.items() if fits(feature)) or "none"
            raise DataError(
                f"{where}: the column {column!r} is of type {_type_of(features[column])}, but must hold {what}; set "
                f"{setting} to a column that does ({fitting})."
            )


def _type_of(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _holds_image(feature: Any) -> bool:
    is_file = isinstance(feature, dict) and "bytes" in feature
    return is_file or type(feature).__name__ == "Image" or _type_of(feature).removeprefix("large_") in _PLAIN


_PLAIN = ("string", "binary")


def _holds_text(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return _type_of(inner) in ("string", "large_string")


def _holds_class(feature: Any) -> bool:
    kind = _type_of(feature)
    return kind in ("string", "large_string") or kind.startswith(("int", "uint"))
