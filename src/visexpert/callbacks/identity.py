"""What makes scores of two runs comparable: identities of data, tokenizer and metrics, as JSON values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning.pytorch import Trainer

METRICS_VERSION = 1
"""Raise it when a score changes its value or meaning under an old name: runs of unlike versions are not compared."""


def score_identity(trainer: Trainer) -> dict[str, Any]:
    """Identities of what a stage read and how it is scored; None where the data does not tell."""
    data = getattr(trainer, "datamodule", None)
    return {
        "metrics_version": METRICS_VERSION,
        "data": data_identity(data),
        "tokenizer": tokenizer_identity(getattr(data, "tokenizer", None)),
        "processes": trainer.world_size,
    }


def data_identity(data: Any) -> dict[str, Any] | None:
    """Class of a set-up data module and the fingerprint of the images of each split in use, where it has any."""
    if data is None:
        return None
    sources = data.image_sources() if hasattr(data, "image_sources") else {}
    return {"class": type(data).__name__, "images": {name: source.fingerprint for name, source in sources.items()}}


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Digest of a transformers tokenizer: vocabulary, merges and normalization, not its padding; None for no such."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        content = tokenizer.get_vocab()
    else:
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
