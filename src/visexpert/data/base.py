"""What all data modules share: they print in one line, without reading anything."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from lightning.pytorch import LightningDataModule


class DataModule(LightningDataModule):
    """A data module that prints in one line: Lightning's own text opens every loader."""

    @abstractmethod
    def described(self) -> Sequence[str]:
        """Return what its line says, from settings alone."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.described())})"

    def __str__(self) -> str:
        return repr(self)
