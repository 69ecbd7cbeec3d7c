"""What a configuration stores, for ``visexpert extract``: its method with weights, its images, its store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from visexpert import shipped
from visexpert.captioning import device_of
from visexpert.errors import ConfigError
from visexpert.experts import FeatureCache
from visexpert.methods import Method, StoreSettings
from visexpert.planning.read import build_parsed, parse_configs
from visexpert.types import ImageSource


class Extraction:
    """What a configuration stores: the method with its weights, the images, and the folder.

    Args:
        options: Options of the command.
        overrides: Arguments of fit.
    """

    def __init__(self, options: Any, overrides: Sequence[str]) -> None:
        self.options = options
        self.parsed = parse_configs(options.config, overrides, command="extract")
        given = {name: getattr(options, name) for name in ("shard_mb", "batch_size")}
        given = {name: value for name, value in given.items() if value is not None}
        self.store = replace(store_settings(self.parsed, options.store), **given)
        torch.manual_seed(int(self.parsed.get("seed_everything") or 0))  # encoders without weights are those of the fit
        self.method, self.data = build_parsed(self.parsed, options.config, command="extract")
        self.words = [word for path in options.config for word in ("--config", shipped.shown(path))] + list(overrides)
        if not self.method.stored_tokens():
            raise ConfigError(
                f"{type(self.method).__name__} stores no tokens as configured, since no frozen encoder runs in "
                "training; name a configuration with experts or teachers."
            )

    @property
    def cache(self) -> FeatureCache:
        """The store, opened anew."""
        return opened(self.store)

    def sources(self) -> Mapping[str, ImageSource]:
        """Prepare the data and return the images by split.

        Raises:
            ConfigError: The data does not provide images by row.
            DataError: Something is missing.
        """
        if not hasattr(self.data, "image_sources"):
            raise ConfigError(f"{type(self.data).__name__} does not provide images by row, so nothing can be stored.")
        self.data.prepare_data()
        self.data.setup("fit")
        if self.method.stores_test_images and self.parsed.get("test_after_fit"):
            self.data.setup("test")
        found: Mapping[str, ImageSource] = self.data.image_sources()
        return found

    def loaded(self) -> Method:
        """Return the method with its weights, on the device, in eval mode."""
        start = (self.parsed["model"].get("init_args") or {}).get("init_from")
        if start is not None:
            self.method.init_from = start
        self.method.load_weights()
        self.method.to(_device(self.options.device)).eval()
        return self.method

    def use(self, cache: FeatureCache) -> Mapping[str, ImageSource]:
        """Let the method store its tokens in a cache, and return the images by split."""
        sources = self.sources()
        self.loaded().read_features(cache, sources)
        return sources


def store_settings(parsed: Mapping[str, Any], folder: str | None) -> StoreSettings:
    """Return the store's settings, with a folder.

    Raises:
        ConfigError: The model has no store.
    """
    arguments = parsed["model"].get("init_args") or {}
    if "store" not in arguments:
        raise ConfigError(
            f"{parsed['model'].get('class_path')} has no setting store, so nothing can be stored; name another model."
        )
    settings = dict(arguments["store"] or {})
    settings["folder"] = folder or settings.get("folder") or "auto"
    return StoreSettings(**settings)


def opened(settings: StoreSettings) -> FeatureCache:
    """Open a store that has a folder."""
    cache = settings.open()
    assert cache is not None
    return cache


def _device(name: str) -> torch.device:
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count) if count else torch.device("cpu")
    return device_of(name)
