"""Whether stored tokens are as they were written: every shard against its checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visexpert.errors import DataError
from visexpert.io.reading import read_json
from visexpert.store.features import CARD, read_card
from visexpert.store.key import FeatureKey
from visexpert.store.places import Place
from visexpert.store.shard import fault_of, shards_of


@dataclass(frozen=True)
class Checked:
    """A shard that was read from beginning to end.

    Args:
        place: The store.
        folder: Its folder there.
        name: Its file.
        owner: Whose tokens it holds.
        rows: Its images.
        fault: What is wrong with it; None if nothing is.
    """

    place: Place
    folder: str
    name: str
    owner: str
    rows: range
    fault: str | None

    @property
    def path(self) -> Path:
        """Its file on this machine."""
        return self.place.root / self.folder / self.name

    def __str__(self) -> str:
        return f"{self.place}/{self.folder}/{self.name}"

    def remove(self) -> None:
        """Remove its file."""
        self.place.remove(self.folder, self.name)

    def exists(self) -> bool:
        """Return whether its file is in the store."""
        return self.name in self.place.sizes(self.folder)


def verify(root: Path | Place) -> Iterator[Checked]:
    """Read every shard of a store and compare it with its checksum; shards that are not made yet are left out.

    Args:
        root: Folder of the store, or its place. From a URL every shard is fetched anew.

    Yields:
        Each shard, when it has been read.

    Raises:
        DataError: The folder is not a store, or a card is damaged.
    """
    place = root if isinstance(root, Place) else Place(root)
    folders = [folder for folder in place.folders() if CARD in place.sizes(folder)]
    if not folders:
        raise DataError(f"There is no feature store in {place}; name another folder, or fill one first.")
    for folder in folders:
        key = _key_of(place, folder)
        card = read_card(place, key)
        assert card is not None
        there = place.sizes(folder)
        for shard in shards_of(key, card["rows_per_shard"]):
            if shard.name in there:
                fault = fault_of(place.bring(folder, shard.name, anew=True), shard)
                yield Checked(place, folder, shard.name, card["name"], shard.rows, fault)


def _key_of(place: Place, folder: str) -> FeatureKey:
    path = f"{place}/{folder}/{CARD}"
    try:
        card = read_json(place.bring(folder, CARD, anew=True))
        fields = {name: card[name] for name in FeatureKey.__dataclass_fields__}
        key = FeatureKey(**{**fields, "grid_hw": tuple(fields["grid_hw"])})
        is_its_own = key.name == folder
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The card {path} is damaged ({error!r}); delete {place}/{folder} to have it computed again."
        ) from error
    if not is_its_own:
        raise DataError(f"The card {path} does not describe the tokens beside it; delete {place}/{folder}.")
    return key
