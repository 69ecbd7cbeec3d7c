"""Read YAML into a method on ``meta`` and its data, exactly as a fit would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import LightningDataModule

from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.planning.meta import weightless
from visexpert.runs import build
from visexpert.training import RunParser, VisexpertCLI


@dataclass(frozen=True)
class Planned:
    """A configuration and what it builds.

    Args:
        config: The resolved configuration: defaults filled in, interpolations done.
        method: The method, its parameters on ``meta``.
        data: The data, built but not prepared.
    """

    config: Mapping[str, Any]
    method: Method
    data: LightningDataModule

    @property
    def trainer(self) -> Mapping[str, Any]:
        """Settings of the trainer."""
        return self.config.get("trainer") or {}


class ConfigReader(VisexpertCLI):
    """Parses what ``visexpert fit`` parses and stops before the trainer, which would ask for its GPUs."""

    reads_only = True
    parsed: Mapping[str, Any]

    def instantiate_classes(self) -> None:
        """Keep the configuration; build and run nothing."""
        self.parsed = self.config[self.subcommand].as_dict()
        self.subcommand = None


def read_configs(configs: Sequence[str | Path], overrides: Sequence[str] = ()) -> Planned:
    """Read configurations, later ones over earlier ones, and build model and data without weights.

    Args:
        configs: YAML files.
        overrides: Further arguments of ``visexpert fit``, such as ``--trainer.max_steps 100``.

    Raises:
        ConfigError: A key or class does not exist, or the model is not a method.
        WeightsError: The configuration of a pretrained model is not on this machine.
    """
    arguments = ["fit", *(part for path in configs for part in ("--config", str(path))), *overrides]
    parsed = ConfigReader(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=None,
        parser_class=RunParser,
        parser_kwargs={"parser_mode": "omegaconf"},
        auto_configure_optimizers=False,
        args=arguments,
    ).parsed
    named = " ".join(map(str, configs))
    if not {"model", "data"} <= {key for key, value in parsed.items() if value}:
        raise ConfigError(f"{named} lacks model or data; `visexpert plan` needs both, as `visexpert fit` does.")
    with weightless():
        method, data = build(parsed, Path(str(configs[-1])) if configs else Path("the command line"))
    if not isinstance(method, Method):
        raise ConfigError(
            f"{named} trains a {type(method).__name__}; `visexpert plan` needs a method (visexpert.methods.Method)."
        )
    return Planned(parsed, method, data)
