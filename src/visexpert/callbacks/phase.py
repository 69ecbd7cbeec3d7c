"""What detachment and merging share: they work on a trained model and write a run folder of their own."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from visexpert.callbacks.checkpoint_io import WholeFileIO, save_whole
from visexpert.callbacks.cost import CostReport
from visexpert.callbacks.figures import RunFigures
from visexpert.callbacks.progress import ThroughputMonitor, TrainingProgress
from visexpert.callbacks.run_folder import RunFolder, RunLogger, folder_of
from visexpert.callbacks.stop import MetricsContinuation, StopOnSignal
from visexpert.errors import ConfigError
from visexpert.interruption import check
from visexpert.io.run_files import read_json, write_text
from visexpert.io.run_folder import hold, stamped
from visexpert.io.weights import weights_digest
from visexpert.methods import FusingMethod, Method
from visexpert.methods.fusing import fusing
from visexpert.processes import joined, of_first

log = logging.getLogger(__name__)

TRAINING = "training.ckpt"
"""Checkpoint of an unfinished phase; ``last.ckpt`` stands for the finished model alone."""


@dataclass(frozen=True)
class PhaseSettings:
    """How a phase trains and scores, taken from the run.

    Args:
        accelerator: As the run's.
        devices: Number of devices of this machine, each with a process of its own.
        num_nodes: Number of machines.
        precision: Lightning's name of the precision.
        log_every_n_steps: Steps between two rows of ``metrics.csv``.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Any = "32-true"
    log_every_n_steps: int = 20

    @classmethod
    def of(cls, trainer: Trainer) -> PhaseSettings:
        """Those of a trainer."""
        name = getattr(type(trainer.accelerator), "name", None)
        accelerator = str(name()) if name is not None else "auto"
        rows = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return cls(accelerator, trainer.num_devices, trainer.num_nodes, str(trainer.precision), rows)

    def start_processes(self) -> None:
        """Start the other processes, which run the same command, and join them; once they are joined, do nothing."""
        if self.devices * self.num_nodes == 1 or joined():
            return
        trainer = L.Trainer(**self._machine(), logger=False, enable_checkpointing=False, enable_progress_bar=False)
        launcher: Any = trainer.strategy.launcher
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)

    def scorer(self, folder: Path, **options: Any) -> Trainer:
        """Return a trainer that scores as ``visexpert validate`` would, and writes nothing.

        Args:
            folder: Folder of the run.
            options: More of Lightning's own.
        """
        return L.Trainer(
            **self._machine(),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[TrainingProgress()],
            **options,
        )

    def _machine(self) -> dict[str, Any]:
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "precision": self.precision,
        }

    def trainer(
        self,
        folder: Path,
        *,
        steps: int = 0,
        checkpoint_every: int | None = None,
        cost: CostReport | None = None,
        **options: Any,
    ) -> Trainer:
        """A trainer that writes into ``folder``.

        Args:
            folder: Folder of the phase.
            steps: Optimizer steps; 0 for a trainer that only scores.
            checkpoint_every: Steps between checkpoints to continue from; None for none.
            cost: The report that saw the training, so that the test's says how long it took.
            options: More of Lightning's own.
        """
        callbacks: list[Callback] = [
            TrainingProgress(),
            ThroughputMonitor(),
            MetricsContinuation(),
            RunFolder(),
            RunFigures(),
            cost or CostReport(),
        ]
        if checkpoint_every is not None:
            callbacks.append(StopOnSignal(checkpoint=folder / "checkpoints" / TRAINING))
            callbacks.append(
                ModelCheckpoint(
                    dirpath=folder / "checkpoints",
                    filename=Path(TRAINING).stem,
                    enable_version_counter=False,
                    every_n_train_steps=checkpoint_every,
                )
            )
        return L.Trainer(
            **self._machine(),
            max_steps=max(steps, 1),
            logger=RunLogger(str(folder)),
            default_root_dir=folder,
            callbacks=callbacks,
            enable_checkpointing=checkpoint_every is not None,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=self.log_every_n_steps,
            plugins=[WholeFileIO()],
            **options,
        )


class Phase(Callback):
    """Work on a trained model that leaves a run folder of its own inside the run's: detachment, merging.

    It begins when training has ended, or at the end of a test where one follows (`visexpert fit` tests by itself), so
    that the run's own scores are those of the whole model; with `visexpert test` it works on a finished run. Phases
    run in the order in which they are listed; each sees the model as the one before left it.

    Args:
        name: Folder inside the run's.
    """

    needs_validation = False
    """Whether the phase scores on validation images."""

    def __init__(self, *, name: str) -> None:
        if not name or Path(name).name != name:
            raise ConfigError(f"{type(self).__name__}: name={name!r} must be a plain folder name, such as 'merged'.")
        self.name = name
        self.test_follows = False

    def carry_out(self, model: FusingMethod, data: LightningDataModule, folder: Path, settings: PhaseSettings) -> Path:
        """Do the work, alone in the phase's folder. See :meth:`apply`.

        Raises:
            ConfigError: Another command works there.
        """
        settings.start_processes()
        with ExitStack() as held:
            of_first(lambda: held.enter_context(hold(folder, self.name)))
            return self.apply(model, data, folder, settings)

    @abstractmethod
    def apply(self, model: FusingMethod, data: LightningDataModule, folder: Path, settings: PhaseSettings) -> Path:
        """Do the work; of several processes each calls this, and the first one writes and decides.

        Args:
            model: Trained, weights in place.
            data: Its data.
            folder: The run's folder.
            settings: How to train and score.

        Returns:
            The phase's own folder.
        """

    def next_commands(self, folder: Path, out: Path) -> tuple[tuple[object, ...], ...]:
        """Return what can be typed when the phase is done, each the words after ``visexpert``.

        Args:
            folder: The run's folder.
            out: The phase's own folder.
        """
        return (("test", out), ("compare", folder, out, "--out", folder / "compare"))

    def check_start(self, model: FusingMethod) -> None:
        """Refuse, before anything trains, what would fail when the phase begins.

        Args:
            model: Built; its weights may be yet to come.

        Raises:
            ConfigError: The phase cannot work on it.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before a fit that its model, strategy and validation images suit the phase that follows."""
        if stage != "fit":
            return
        self.check_start(self._fitting(trainer, pl_module))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        has_val = type(data).val_dataloader is not LightningDataModule.val_dataloader and len(data.val_dataloader())
        if self.needs_validation and not has_val:
            raise ConfigError(
                f"{type(self).__name__} scores on validation images, but {type(data).__name__} has none; give the data "
                "some (num_val, or a val part), or remove the callback."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the phase now, unless a test follows."""
        if not self.test_follows:
            self._run(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Run the phase after the test, when the trainer no longer holds the model."""
        if stage == "test":
            self._run(trainer, pl_module)

    def _fitting(self, trainer: Trainer, model: LightningModule) -> FusingMethod:
        """Return the model; check that the phase can work on it and that each process has all of it."""
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise ConfigError(
                f"{type(self).__name__} needs the whole model on each device, but {type(trainer.strategy).__name__} "
                "splits it; remove the callback, and pass the finished run to `visexpert detach` or `visexpert merge`, "
                "or train with strategy ddp."
            )
        return fusing(model, wanted_by=type(self).__name__)

    def _run(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.interrupted:
            return
        check()
        model = self._fitting(trainer, model)
        data: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        with kept_trainer(model, data):
            self.carry_out(model, data, folder_of(trainer), PhaseSettings.of(trainer))


def scores_told(run: Path, out: Path, names: Iterable[str]) -> list[str]:
    """Return each score before and after a phase, from the ``metrics.json`` of both folders.

    Args:
        run: The run that the phase worked on.
        out: The phase's own folder.
        names: Scores to tell, such as ``test/nll/nll``; those that neither folder has are left out.
    """
    before, after = (read_json(path) if path.is_file() else {} for path in (run / "metrics.json", out / "metrics.json"))
    return [
        f"{name} {_number(before.get(name))} before, {_number(after.get(name))} after"
        for name in dict.fromkeys(names)
        if name in before or name in after
    ]


def usual_score(run: Path) -> str:
    """Return the test score that a run is known by: answers to questions, else captions."""
    scores = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    return next((name for name in ("vqa/accuracy", "caption/cider") if f"test/{name}" in scores), "vqa/accuracy")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


@contextmanager
def kept_trainer(model: Method, data: LightningDataModule) -> Iterator[None]:
    """Restore the trainer of model and data after another one has used them."""
    before = model._trainer, data.trainer
    try:
        yield
    finally:
        model._trainer, data.trainer = before


def weights_identity(model: Method) -> str:
    """Return a hash of the trained weights and attached experts that a phase starts from."""
    trained = [module for group in model.trained_groups() for module in group.modules]
    return weights_digest(nn.ModuleList(trained), facts=",".join(model.hub.attached))


def write_checkpoint(model: Method, folder: Path, *, steps: int) -> None:
    """Write ``checkpoints/last.ckpt`` whole or not at all; it marks a phase as finished. Every process must call this.

    Raises:
        DataError: The disk is full or the folder cannot be written.
    """
    checkpoint: dict[str, Any] = {
        "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
        "global_step": steps,
        "epoch": 0,
        "pytorch-lightning_version": L.__version__,
    }
    model.on_save_checkpoint(checkpoint)
    path = folder / "checkpoints" / "last.ckpt"

    def write() -> None:
        save_whole(checkpoint, path)
        (path.parent / TRAINING).unlink(missing_ok=True)

    of_first(write)


def write_derived_config(run: Path, folder: Path, derived: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Write the phase's ``config.yaml``: the run's, with the method's arguments as the phase leaves them.

    Args:
        run: The run's folder; without a ``config.yaml`` (runs made in Python) there is nothing to derive.
        folder: The phase's folder.
        derived: The run's ``init_args`` to those of the phase's model.
    """
    source = run / "config.yaml"
    if not source.is_file():
        log.warning("%s has no config.yaml, so %s gets none: only your own code can load it.", run, folder)
        return
    config: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    config["model"]["init_args"] = dict(derived(config["model"]["init_args"]))
    config["run"] = str(folder)
    callbacks = config.get("trainer", {}).get("callbacks")
    if isinstance(callbacks, list):
        config["trainer"]["callbacks"] = [entry for entry in callbacks if not _is_phase(entry)]
    write_text(folder / "config.yaml", stamped(yaml.safe_dump(config, sort_keys=False)))


def saved_settings(run: Path) -> PhaseSettings:
    """Return how a finished run trained, from its ``config.yaml``, but for its number of processes."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    trainer = copy.copy(config.get("trainer") or {})
    return PhaseSettings(
        accelerator=trainer.get("accelerator") or "auto",
        precision=trainer.get("precision") or "32-true",
        log_every_n_steps=trainer.get("log_every_n_steps") or 20,
    )


def _is_phase(entry: Mapping[str, Any]) -> bool:
    phases = {f"visexpert.callbacks.{phase.__name__}" for phase in Phase.__subclasses__()}
    phases |= {f"{phase.__module__}.{phase.__name__}" for phase in Phase.__subclasses__()}
    return entry.get("class_path") in phases
