"""The feature store: frozen tokens on disk, with provenance."""

from visexpert.store.features import (
    EncodeRows,
    FeatureFile,
    Filling,
    finish_card,
    nearest,
    of_earlier_versions,
    open_features,
    stored_rows,
    write_features,
)
from visexpert.store.key import SHARD_MB, FeatureKey, StoreDtype, bytes_per_image
from visexpert.store.places import Place, check_url, is_url, place_at
from visexpert.store.processes import processes
from visexpert.store.verify import Checked, verify

__all__ = [
    "SHARD_MB",
    "Checked",
    "EncodeRows",
    "FeatureFile",
    "FeatureKey",
    "Filling",
    "StoreDtype",
    "Place",
    "bytes_per_image",
    "check_url",
    "is_url",
    "place_at",
    "nearest",
    "of_earlier_versions",
    "finish_card",
    "open_features",
    "processes",
    "stored_rows",
    "verify",
    "write_features",
]
