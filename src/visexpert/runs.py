"""A finished run, read back: its model with trained weights, its data and what it was made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from visexpert.checking import built, check_settings
from visexpert.errors import ConfigError, WeightsError
from visexpert.io.checkpoints import load_checkpoint
from visexpert.io.reading import read_yaml
from visexpert.io.run_folder import blamed_on_version
from visexpert.methods import Method
from visexpert.parse_errors import explain
from visexpert.run_arguments import checkpoint_of, config_of
from visexpert.trust import guarded, refuse_strangers
from visexpert.typed import typed


@dataclass(frozen=True)
class SavedRun:
    """A run's folder, opened.

    Args:
        folder: The folder.
        config: Its ``config.yaml``.
        model: The method with the run's weights, on the CPU, in eval mode.
        data: The data module, built but not prepared: nothing is rendered or downloaded.
        steps: Optimizer steps behind the weights.
    """

    folder: Path
    config: Mapping[str, Any]
    model: Method
    data: LightningDataModule
    steps: int

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the run's data."""
        return self.data.tokenizer  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        parts = f"{type(self.model).__name__}, {type(self.data).__name__}, {self.steps:,} steps"
        return f"SavedRun({str(self.folder)!r}, {parts})"


@typed
def load_run(folder: str | Path, *, trust: Sequence[str] = ()) -> SavedRun:
    """Build what a run's ``config.yaml`` names and fill it from ``checkpoints/last.ckpt``.

    Args:
        folder: Folder that ``visexpert fit --run`` (or ``merge``, ``detach``) wrote.
        trust: Modules of yours whose classes its configuration may name, beside those of ``--trust``.

    Raises:
        ConfigError: The folder is not a run, is unfinished, its configuration no longer builds, or names foreign code.
        WeightsError: The checkpoint is damaged, could run code, or does not fit the configuration.
    """
    folder = Path(folder)
    path = config_of(folder)
    config = read_config(path)
    checkpoint_path = checkpoint_of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(int(config.get("seed_everything") or 0))  # encoders without weights are random, but the same
        model, data = build(config, path, foreign=True, trust=trust)
    if not isinstance(model, Method):
        raise ConfigError(f"'{folder}' trained a {type(model).__name__}, which is no vision-language model.")
    checkpoint = read_checkpoint(checkpoint_path)
    model.load_weights()
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{checkpoint_path} does not fit {path} ({str(error).splitlines()[-1].strip()[:160]}); "
            "was one of them replaced?"
        ) from error
    model.mark_loaded()
    return SavedRun(folder, config, model.eval(), data, int(checkpoint["global_step"]))


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's configuration.

    Raises:
        ConfigError: It is no YAML mapping with a model and data.
    """
    try:
        config = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]}); train the run again.") from error
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        raise ConfigError(f"{path} is no configuration of a run: it needs the keys model and data.")
    return config


def build(
    config: Mapping[str, Any], path: Path, *, foreign: bool = False, trust: Sequence[str] = ()
) -> tuple[L.LightningModule, LightningDataModule]:
    """Build model and data of a configuration, without weights.

    Args:
        config: Mapping with ``model`` and ``data``.
        path: Its file, for messages.
        foreign: It may be anyone's: refuse classes that are neither known nor trusted.
        trust: See :func:`load_run`.

    Raises:
        ConfigError: A class or a setting is not known (any more), or is not trusted.
    """
    parser = ArgumentParser(exit_on_error=False)  # a saved configuration has its interpolations resolved
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    for key in ("model", "data"):
        if not isinstance(config[key], Mapping):
            raise ConfigError(f"{path}: {key} is {config[key]!r:.80}, but must be a mapping with a class_path.")
    wanted = {"model": _without_start(config["model"]), "data": config["data"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            if foreign:
                refuse_strangers(wanted, path, trust=trust)
            with guarded(path if foreign else None, trust=trust):
                parsed = parser.parse_object(wanted, defaults=False)  # the classes have their own
        except ArgumentError as error:
            raise blamed_on_version(ConfigError(f"{path}: {explain(str(error), [])}"), [path]) from error
        if foreign:  # a part may have come from another file that it names
            refuse_strangers(parsed, path, trust=trust)
        check_settings(parsed.as_dict())
        objects = built(lambda: parser.instantiate_classes(parsed), who=str(path))
    return objects.model, objects.data


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without running code from it.

    Raises:
        WeightsError: It is damaged, holds code, or has no weights.
    """
    checkpoint = load_checkpoint(path, owner="The run")
    if not isinstance(checkpoint.get("global_step"), int):
        raise WeightsError(
            f"{path} does not say after how many steps it was saved; give the folder that `visexpert fit --run` wrote."
        )
    return checkpoint


def _without_start(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's configuration without the run that it once started from, which may be gone."""
    settings = copy.deepcopy(dict(model))
    if isinstance(settings.get("init_args"), dict) and "init_from" in settings["init_args"]:
        settings["init_args"]["init_from"] = None
    return settings
