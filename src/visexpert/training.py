"""LightningCLI with a run folder: one place for logs, checkpoints, figures and the final table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from visexpert.callbacks import (
    CostReport,
    RunFigures,
    RunFolder,
    RunLogger,
    SaveRunConfig,
    ThroughputMonitor,
    TrainingProgress,
)
from visexpert.errors import ConfigError

SCORING = ("validate", "test", "predict")


class VisexpertCLI(LightningCLI):
    """Adds ``--run`` and ``--test_after_fit``, and the callbacks that write a run's folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Arguments of our own."""
        parser.add_argument(
            "--run", type=str, default="runs/default",
            help="Folder of the run: config.yaml, metrics.csv, metrics.json, figures/, checkpoints/.",
        )  # fmt: skip
        parser.add_argument(
            "--checkpoint_every", type=int, default=250, help="Steps between checkpoints; --ckpt_path last continues."
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Score the test split when training is done."
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes into the run's folder."""
        run = str(self._value("run"))
        kwargs["default_root_dir"] = run
        kwargs["logger"] = RunLogger(run)
        self.trainer_defaults["callbacks"] = default_callbacks(Path(run), every_n_steps=self._value("checkpoint_every"))
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, L.Trainer)
        return trainer

    def after_fit(self) -> None:
        """Score the final weights."""
        has_test = type(self.datamodule).test_dataloader is not L.LightningDataModule.test_dataloader
        if self._value("test_after_fit") and has_test and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule)

    def _value(self, key: str) -> Any:
        config = self.config.get(self.subcommand) if self.subcommand else self.config
        return config.get(key)


def run_lightning(arguments: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    ``visexpert test --run RUN`` alone scores a finished run: its own configuration and last checkpoint are filled in.
    """
    VisexpertCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveRunConfig,
        trainer_defaults={"enable_model_summary": False},
        parser_kwargs={"parser_mode": "omegaconf", "description": "Turn frozen vision experts into one better CLIP."},
        auto_configure_optimizers=False,
        args=complete_from_run(arguments),
    )


def complete_from_run(arguments: list[str]) -> list[str]:
    """Fill in ``--config`` and ``--ckpt_path`` from the folder given by ``--run``, for commands that score.

    Raises:
        ConfigError: The folder is no run.
    """
    if not arguments or arguments[0] not in SCORING or _option(arguments, "--config") or _option(arguments, "-c"):
        return arguments
    run = _option(arguments, "--run")
    if run is None:
        return arguments
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise ConfigError(
            f"'{run}' is no run: it has no config.yaml; give the folder that `visexpert fit --run` wrote."
        )
    completed = [arguments[0], "--config", str(config), *arguments[1:]]
    if _option(arguments, "--ckpt_path") is None:
        last = Path(run) / "checkpoints" / "last.ckpt"
        if not last.is_file():
            raise ConfigError(
                f"The run '{run}' has no checkpoint {last}; let `visexpert fit --run {run}` finish first."
            )
        completed += ["--ckpt_path", str(last)]
    return completed


def _option(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None


def default_callbacks(run: Path, *, every_n_steps: int) -> list[L.Callback]:
    """What every run carries: progress, throughput, run folder, figures, the last checkpoint."""
    return [
        TrainingProgress(),
        ThroughputMonitor(),
        RunFolder(),
        CostReport(),
        RunFigures(),
        ModelCheckpoint(
            dirpath=run / "checkpoints", filename="{step}", save_last=True, every_n_train_steps=every_n_steps
        ),
    ]
