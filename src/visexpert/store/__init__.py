"""The feature store: frozen tokens on disk, with provenance."""

from visexpert.store.features import (
    FeatureFile,
    FeatureKey,
    StoreDtype,
    of_earlier_versions,
    open_features,
    write_features,
)

__all__ = ["FeatureFile", "FeatureKey", "StoreDtype", "of_earlier_versions", "open_features", "write_features"]
