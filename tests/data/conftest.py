"""What tests of data modules share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule


@pytest.fixture
def parse_data() -> Callable[[dict[str, Any]], Any]:
    """Build a data module from what a YAML would say."""

    def build(config: dict[str, Any]) -> Any:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return parser.instantiate_classes(parser.parse_object({"data": config})).data

    return build
