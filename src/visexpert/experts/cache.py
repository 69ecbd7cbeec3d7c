"""Tokens of frozen encoders for a run: computed once per set of images, then read from the feature store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from visexpert.names import EncoderName
from visexpert.store import (
    FeatureFile,
    FeatureKey,
    StoreDtype,
    of_earlier_versions,
    open_features,
    write_features,
)
from visexpert.types import Batch, ImageSource

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]


class FeatureCache:
    """Feature files of a run, by encoder and split.

    Args:
        root: Folder of the store. Runs may share it: each file is named by a hash of what its tokens depend on.
        dtype: ``float32`` gives the loss of live encoders, up to what batch size changes in their output; ``float16``
            and ``bfloat16`` take half the space, ``bfloat16`` with fewer digits but a larger range.
    """

    def __init__(self, root: str | Path, *, dtype: StoreDtype = "float16") -> None:
        self.root = Path(root).expanduser()
        self.dtype: StoreDtype = dtype
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
        device: torch.device,
        batch_size: int = 64,
    ) -> None:
        """Open the tokens of one encoder for one split; compute them first if no run has done so.

        Args:
            name: Encoder whose tokens they are.
            split: Name of the split.
            source: Images of the split.
            fingerprint: Fingerprint of the encoder.
            encode: Maps images (B, 3, H, W), float in [0, 1], to tokens (B, S, E).
            grid_hw: Grid of these tokens.
            device: Device on which ``encode`` runs.
            batch_size: Images per call of ``encode``.
        """
        with torch.no_grad():
            sample = encode(_images(source, [0], device))
        key = FeatureKey(
            role=name.role,
            data=source.fingerprint,
            encoder=fingerprint,
            rows=len(source),
            tokens=sample.shape[1],
            width=sample.shape[2],
            grid_hw=grid_hw,
            dtype=self.dtype,
        )
        file = open_features(self.root, key)
        if file is None:
            self._look_for_earlier_versions()
            batches = _encoded(source, encode, device, batch_size, label=f"{name} tokens of {split}")
            file = write_features(self.root, key, batches, owner=f"Encoder '{name.name}'")
        self._files[name, split] = file

    def _look_for_earlier_versions(self) -> None:
        """Warn once about files that only take up space."""
        old = [] if self._has_looked else of_earlier_versions(self.root)
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


def _encoded(
    source: ImageSource, encode: Encode, device: torch.device, batch_size: int, *, label: str
) -> Iterator[Tensor]:
    with torch.no_grad():
        for start in tqdm(range(0, len(source), batch_size), desc=label, unit="batch", mininterval=1.0):
            rows = range(start, min(start + batch_size, len(source)))
            yield encode(_images(source, list(rows), device))


def _images(source: ImageSource, rows: list[int], device: torch.device) -> Tensor:
    return source.read(rows).to(device).float() / 255.0
