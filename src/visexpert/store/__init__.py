"""The feature store: frozen tokens on disk, with provenance."""

from visexpert.store.features import FeatureFile, FeatureKey, of_earlier_versions, open_features, write_features
from visexpert.store.numbers import StoreDtype

__all__ = ["FeatureFile", "FeatureKey", "StoreDtype", "of_earlier_versions", "open_features", "write_features"]
