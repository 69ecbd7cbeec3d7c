"""The pooled output of an encoder, recorded in the forward pass that also gives its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from visexpert.vision.encoder import VisionEncoder


@dataclass
class PooledRecord:
    """What one encoder pooled.

    Args:
        pooled_BP: Pooled output (B, P) of its last forward pass; None before the first.
    """

    pooled_BP: Tensor | None = None


@contextmanager
def record_pooled(encoder: VisionEncoder) -> Iterator[PooledRecord]:
    """Run all blocks in each forward pass of this context, and record the pooled output beside the tokens.

    Raises:
        ConfigError: The encoder has no pooled output.
    """
    encoder.require_pooled()
    record = PooledRecord()

    def keep(pooled_BP: Tensor) -> None:
        record.pooled_BP = pooled_BP

    before, encoder.pooled_to = encoder.pooled_to, keep
    try:
        yield record
    finally:
        encoder.pooled_to = before
