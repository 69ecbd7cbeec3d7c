"""Tokens of frozen encoders for a run: computed once per set of images, then read from the feature store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from visexpert.errors import DataError
from visexpert.io.weights import cache_root
from visexpert.names import EncoderName
from visexpert.store import (
    SHARD_MB,
    EncodeRows,
    FeatureFile,
    FeatureKey,
    Filling,
    Place,
    StoreDtype,
    finish_card,
    nearest,
    of_earlier_versions,
    open_features,
    place_at,
    processes,
    stored_rows,
    write_features,
)
from visexpert.types import Batch, ImageSource

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]


class FeatureCache:
    """Stored tokens of a run, by encoder and split.

    Args:
        root: Folder of the store, its URL, or its place. Runs may share it: each set of tokens is named by a hash of
            what it depends on.
        dtype: ``float32`` gives the loss of live encoders, up to what batch size changes in their output; ``float16``
            and ``bfloat16`` take half the space, ``bfloat16`` with fewer digits but a larger range; ``int8`` takes a
            quarter, with a scale per token.
        shard_mb: Size of new shards, in millions of bytes.
        batch_size: Images per call of an encoder.
        fill: Whether to compute tokens that are missing; without it they are refused.
        waits: Whether to wait for tokens that other processes are making; without them they are ``unfinished``.
        local: Folder of this machine for shards of a URL.
    """

    def __init__(
        self,
        root: str | Path | Place,
        *,
        dtype: StoreDtype = "float16",
        shard_mb: float = SHARD_MB,
        batch_size: int = 64,
        fill: bool = True,
        waits: bool = True,
        local: str | Path | None = None,
    ) -> None:
        fetched = cache_root() / "fetched" if local is None else Path(local)
        self.root = root if isinstance(root, Place) else place_at(root, fetched)
        self.dtype: StoreDtype = dtype
        self.shard_mb, self.batch_size, self.waits = shard_mb, batch_size, waits
        self.fill = fill
        self.unfinished: list[str] = []
        self._files: dict[tuple[EncoderName, str], FeatureFile] = {}
        self._has_looked = False

    def prepare(
        self,
        name: EncoderName,
        split: str,
        source: ImageSource,
        *,
        fingerprint: str,
        encode: Encode,
        grid_hw: tuple[int, int],
        width: int,
        tokens: int | None = None,
        device: torch.device,
        batch_size: int | None = None,
    ) -> None:
        """Open the tokens of one encoder for one split; compute those first that no run has stored.

        Processes that call this at once share the work, and each returns when all tokens are there.

        Args:
            name: Encoder whose tokens they are.
            split: Name of the split.
            source: Images of the split.
            fingerprint: Fingerprint of the encoder.
            encode: Maps images (B, 3, H, W), float in [0, 1], to tokens (B, S, E).
            grid_hw: Grid of these tokens.
            width: E.
            tokens: S; None for one per cell of the grid.
            device: Device on which ``encode`` runs.
            batch_size: Images per call of ``encode``; None for the cache's own.
        """
        key = FeatureKey(
            role=name.role,
            data=source.fingerprint,
            encoder=fingerprint,
            rows=len(source),
            tokens=math.prod(grid_hw) if tokens is None else tokens,
            width=width,
            grid_hw=grid_hw,
            dtype=self.dtype,
        )
        size = self.batch_size if batch_size is None else batch_size

        @torch.no_grad()
        def encoded(rows: range) -> Iterator[Tensor]:
            for start in range(rows.start, rows.stop, size):
                yield encode(_images(source, list(range(start, min(start + size, rows.stop))), device))

        self.take(name, split, key, encoded)

    def take(self, name: EncoderName, split: str, key: FeatureKey, encode: EncodeRows) -> None:
        """Open the tokens of a key, stored first where they are missing.

        Args:
            name: Encoder whose tokens they are.
            split: Name of the split.
            key: Provenance.
            encode: Computes the tokens of some rows, batch by batch.

        Raises:
            DataError: Some are missing and must not be computed; what is stored instead is named.
        """
        file = open_features(self.root, key)
        if file is not None and not self.root.is_remote:
            with suppress(OSError):  # a store that is only read
                finish_card(self.root, key)  # which a kill behind the last shard has left as it was
        if file is None and not self.fill:
            raise self._missing(name, split, key)
        if file is None:
            self._look_for_earlier_versions()
            file = self._write(name, split, key, encode)
        if file is None:
            self.unfinished.append(f"{name} of {split}")
        else:
            self._files[name, split] = file

    def _missing(self, name: EncoderName, split: str, key: FeatureKey) -> DataError:
        """Return the error that says what the store has in the place of tokens that may not be computed."""
        stored = stored_rows(self.root, key)
        other = nearest(self.root, key, owner_of(name))
        found = "none are there"
        if stored:
            found = f"only {stored} of them are there"
        elif other:
            found = f"it has others of that encoder: {'; '.join(other)}"
        return DataError(
            f"The feature store in {self.root} lacks tokens of {name} for the {key.rows} images of {split}: {found}; "
            "fill it with visexpert extract, or set store.fill to true."
        )

    def _write(self, name: EncoderName, split: str, key: FeatureKey, encode: EncodeRows) -> FeatureFile | None:
        rank, world = processes()
        label = f"{name} tokens of {split}"
        with tqdm(total=key.rows, desc=label, unit="image", mininterval=1.0, disable=rank > 0) as bar:

            def show(stored: int) -> None:
                bar.update(stored - bar.n)

            filling = Filling(shard_mb=self.shard_mb, rank=rank, world=world, waits=self.waits, progress=show)
            return write_features(self.root, key, encode, owner=owner_of(name), filling=filling)

    def _look_for_earlier_versions(self) -> None:
        """Warn once about files that only take up space."""
        old = [] if self._has_looked or self.root.is_remote else of_earlier_versions(self.root.root)
        self._has_looked = True
        if old:
            size = sum(path.stat().st_size for path in old) / 1e6
            log.warning(
                "The feature store in %s has %d files (%.0f MB, such as %s) of an earlier version, which this version "
                "cannot read; tokens are computed again, and you can delete these files.",
                self.root,
                len(old),
                size,
                old[0].name,
            )

    def read(self, name: EncoderName, batch: Batch) -> Tensor | None:
        """Return the stored tokens (B, S, E) of a batch, float32, on its device; None if there are none."""
        file = self._files.get((name, batch.split))
        if file is None:
            return None
        tokens_BSE, device = file.read(batch.index_B), batch.images_BCHW.device
        # Pinned, so that the host does not wait for the copy.
        return tokens_BSE.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens_BSE.to(device)


def owner_of(name: EncoderName) -> str:
    """Return the name of an encoder on cards and in messages."""
    return f"Encoder '{name.name}'"


def _images(source: ImageSource, rows: list[int], device: torch.device) -> Tensor:
    return source.read(rows).to(device).float() / 255.0
