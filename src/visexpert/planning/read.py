"""Read YAML into a method on ``meta`` and its data, exactly as a fit would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.planning.meta import weightless
from visexpert.runs import build
from visexpert.training import VisexpertCLI


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
    parsed = parse_configs(configs, overrides, command="plan")
    with weightless():
        method, data = build_parsed(parsed, configs, command="plan")
    return Planned(parsed, method, data)


def parse_configs(configs: Sequence[str | Path], overrides: Sequence[str], *, command: str) -> dict[str, Any]:
    """Return the settings that ``visexpert fit`` would take from configurations; the seed is set, nothing is built.

    Args:
        configs: YAML files.
        overrides: Further arguments of ``visexpert fit``.
        command: Who asks, for messages.

    Raises:
        ConfigError: A key or class does not exist, or there is no model or no data.
    """
    arguments = ["fit", *(part for path in configs for part in ("--config", str(path))), *overrides]
    parsed = ConfigReader(save_config_callback=None, args=arguments).parsed
    if not {"model", "data"} <= {key for key, value in parsed.items() if value}:
        named = " ".join(map(str, configs))
        raise ConfigError(f"{named} lacks model or data; `visexpert {command}` needs both, as `visexpert fit` does.")
    return dict(parsed)


def build_parsed(
    parsed: Mapping[str, Any], configs: Sequence[str | Path], *, command: str
) -> tuple[Method, LightningDataModule]:
    """Build method and data of parsed settings, without weights.

    Args:
        parsed: What :func:`parse_configs` returned.
        configs: Their files, for messages.
        command: Who asks, for messages.

    Raises:
        ConfigError: The model is not a method.
    """
    method, data = build(parsed, Path(str(configs[-1])) if configs else Path("the command line"))
    if not isinstance(method, Method):
        raise ConfigError(
            f"{' '.join(map(str, configs))} trains a {type(method).__name__}; `visexpert {command}` needs a method "
            "(visexpert.methods.Method)."
        )
    return method, data
