"""LightningCLI with a run folder: one place for logs, checkpoints, figures and the final table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from visexpert import shipped
from visexpert.callbacks import (
    CostReport,
    MetricsContinuation,
    NearestNeighbors,
    Phase,
    Predictions,
    RunFigures,
    RunFolder,
    RunLogger,
    SaveRunConfig,
    StopOnSignal,
    TextAlignment,
    ThroughputMonitor,
    TrainingProgress,
)
from visexpert.callbacks.checkpoint_io import RunTrainer, use_whole_files
from visexpert.callbacks.predictions import check_replaces, check_writes
from visexpert.callbacks.run_folder import is_finished
from visexpert.checking import (
    SCORED,
    built,
    check_config_file,
    check_has_part,
    check_machine,
    check_run,
    check_settings,
)
from visexpert.data import MixedData, SourceData
from visexpert.data.base import DataModule
from visexpert.errors import ConfigError, UserError, first_line
from visexpert.interruption import stoppable
from visexpert.io.checkpoints import FOLDER, LAST, checked_checkpoint, newest_checkpoint
from visexpert.io.run_folder import blamed_on_version, hold, holds_run, is_of_run, set_run_aside
from visexpert.methods import Method
from visexpert.overlays import MissingBaseError, load_path, parts_without_class, unrelated_settings_dropped
from visexpert.parse_errors import classes_in, explain
from visexpert.run_arguments import CHECKPOINT_WORDS, complete_from_run, config_files, last_checkpoint, option_of
from visexpert.trust import UntrustedError, guarded, refuse_strangers
from visexpert.version import __version__

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Every setting of this command. Settings may be given here or in YAML files (--config); what this machine would "
    "use is shown by --print_config. `visexpert --help` lists all commands."
)


class VisexpertCLI(LightningCLI):
    """Adds ``--run`` and ``--test_after_fit``, and the callbacks that write a run's folder.

    Args:
        held: What keeps the run's folder locked until it is closed; None locks nothing.
        kwargs: See LightningCLI.
    """

    reads_only = False
    """Whether nothing is run, as for a plan."""

    def __init__(self, *, held: ExitStack | None = None, **kwargs: Any) -> None:
        self._held = held
        self._overwrite = False
        kwargs["args"] = shipped.in_arguments(kwargs.get("args") or ())
        self._asked = next(iter(kwargs["args"]), None)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_class=RunParser,
            parser_kwargs={"parser_mode": "omegaconf", "description": DESCRIPTION, "version": __version__},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # else the configuration is written twice
            **kwargs,
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Give arguments to the subcommand that is asked for; the others, a tenth of a second each, stay names."""
        if self._asked in self.subcommands() and self._asked != subcommand:
            return self.init_parser(**kwargs)
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that Lightning does not have."""
        parser.add_argument(
            "--run",
            type=str,
            default="runs/default",
            help="Folder of the run: config.yaml, metrics.csv, metrics.json, figures/, checkpoints/.",
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=250, help="Steps between checkpoints; --ckpt_path last continues."
        )
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="fit: in a folder that holds a run, begin anew; what that run wrote is moved to previous.1 in it. "
            "predict: replace the predictions that are there, or those of a call that was stopped.",
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Score the test split when training is done."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse what the parser lets through and nothing can use."""
        for path in config_files(args or ()):
            check_config_file(path)
        foreign = self._foreign_config(args or ())
        if foreign is not None:
            refuse_strangers(yaml.safe_load(foreign.read_text(encoding="utf-8")), foreign)
        try:
            with guarded(foreign):
                super().parse_arguments(parser, args)
        except OmegaConfBaseException as error:
            raise ConfigError(f"The configuration cannot be filled in ({first_line(error)}); mend it.") from error
        except MissingBaseError as error:
            raise error.beside(config_files(args or ())) from error
        except UntrustedError:
            raise
        except ConfigError as error:
            raise blamed_on_version(error, config_files(args or ())) from error
        subcommand = self.config.get("subcommand")
        if foreign is not None:  # a part may have come from another file that it names
            refuse_strangers(self.config[subcommand] if subcommand else self.config, foreign)
        settings = (self.config[subcommand] if subcommand else self.config).as_dict()
        check_settings(settings)
        check_run(settings, trains=subcommand == "fit")

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint alone: Lightning would lay its ``hyper_parameters`` over the configuration, unasked."""

    def before_instantiate_classes(self) -> None:
        """Never load a checkpoint that could run code; leave out of ``config.yaml`` what is not of this run.

        Raises:
            ConfigError: ``weights_only`` asks for it.
        """
        given = self._value("weights_only")
        if given not in (None, True):
            raise ConfigError(
                f"weights_only is {given!r}, which would let a checkpoint run any code; take it out: checkpoints of "
                "visexpert hold weights and plain values alone."
            )
        if not self.subcommand:
            return
        config = self.config[self.subcommand]
        if config["trainer.fast_dev_run"]:
            self._rehearse(config)
        if not self.reads_only:
            check_machine(config["trainer"].as_dict())
        share = config["trainer.val_check_interval"]
        if isinstance(share, float) and share <= 1:  # of an epoch, so epochs count
            config["trainer.check_val_every_n_epoch"] = config["trainer.check_val_every_n_epoch"] or 1
        config["weights_only"] = True
        self._overwrite, config["overwrite"] = config["overwrite"], False  # another fit of this file must not
        if self.subcommand == "predict" and config["return_predictions"] is None:
            config["return_predictions"] = False  # they are in a file
        if isinstance(config["trainer.logger"], bool):
            config["trainer.logger"] = None  # neither Lightning's default nor none: the run's own is always there

    def _rehearse(self, config: Namespace) -> None:
        """Let a rehearsal (``fast_dev_run``) write into a folder that goes with it; it touches no run."""
        folder = TemporaryDirectory(prefix="visexpert-", ignore_cleanup_errors=True)
        self._rehearsal = folder if self._held is None else self._held.enter_context(folder)
        config["run"] = str(Path(folder.name) / "run")
        log.info("fast_dev_run: a rehearsal of a few batches, of which nothing is kept.")

    def _foreign_config(self, arguments: Sequence[str]) -> Path | None:
        """A configuration that may be anyone's: a run's own, but for a fit, whose ``--config`` the user chose."""
        if arguments and arguments[0] == "fit" and not self.reads_only:
            return None
        run = option_of(list(arguments), "--run")
        folders = () if run is None else (Path(run),)
        return next((path for path in config_files(arguments) if path.parent in folders or is_of_run(path)), None)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a user's error comes out as itself, not inside the parser's."""
        if self.subcommand:
            self._look_for_data()
        built(super().instantiate_classes)

    def _look_for_data(self) -> None:
        """See that the files of our own data are there before models are built, which may take minutes.

        Raises:
            DataError: They are not, those of the test after a fit included.
            WeightsError: The tokenizer is not.
        """
        data = self._value("data")
        source = None if not data else load_path(str(data.get("class_path")))
        if not isinstance(source, type) or not issubclass(source, SourceData | MixedData):
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        alone = Namespace(data=data)  # type: ignore[no-untyped-call]
        made = built(lambda: parser.instantiate_classes(alone), who="The data").data
        made.check_stage(self.subcommand)
        if self.subcommand == "fit" and self._value("test_after_fit"):
            try:
                made.check_stage("test")
            except UserError as error:
                raise type(error)(
                    f"{str(error).rstrip('.')}; the test after this fit needs it: --test_after_fit false leaves that "
                    "out."
                ) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes into the run's folder."""
        run = str(self._value("run"))
        kwargs["default_root_dir"] = run
        kwargs["logger"] = [RunLogger(run), *self._users_loggers()]
        callbacks = default_callbacks()
        if self._value("trainer.enable_progress_bar") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        saves = self._value("trainer.enable_checkpointing") is not False
        callbacks.append(StopOnSignal(checkpoint=last_checkpoint(Path(run)) if saves else None))
        if saves:
            callbacks.append(LastCheckpoint(run=Path(run), every_n_steps=self._value("checkpoint_every")))
        self.trainer_defaults["callbacks"] = callbacks
        instantiate = super().instantiate_trainer
        trainer = built(lambda: instantiate(**kwargs), who="The trainer")
        assert isinstance(trainer, L.Trainer)
        use_whole_files(trainer.strategy)
        return trainer

    def _users_loggers(self) -> list[Logger]:
        """Loggers that were asked for, which work beside the run's own; one of our class is the run's own."""
        given = self._get(self.config_init, "trainer").get("logger") or []
        loggers: list[Logger] = given if isinstance(given, list) else [given]
        return [logger for logger in loggers if not isinstance(logger, RunLogger)]

    def before_fit(self) -> None:
        """Settle step and start; let phases (detachment, merging) wait for the scores of the whole model."""
        if isinstance(self.datamodule, DataModule):
            self.datamodule.settle_accumulation(self.trainer)
        self.resolve_start()
        self._occupy()
        self._clear()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Phase):
                callback.test_follows = self._test_follows

    def before_validate(self) -> None:
        """Settle what weights are scored."""
        if self.subcommand in SCORED:
            check_has_part(self.datamodule, SCORED[self.subcommand], command=self.subcommand)
        self.resolve_start()
        self._occupy()

    before_test = before_validate

    def before_predict(self) -> None:
        """See that there is something to write, then as for the other commands that score."""
        check_writes(self.model)
        check_replaces(self.run_folder, overwrite=self._overwrite)
        self.before_validate()
        config = self.config[self.subcommand]
        settings = {key: str(value) for key, value in config.items() if _decides_answers(key)}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Predictions):
                callback.go_on(self.run_folder, settings, anew=self._overwrite)

    def _occupy(self) -> None:
        """Lock the run's folder, before anything is written.

        Raises:
            ConfigError: Another process writes there.
        """
        if self._held is not None and is_first_process():
            self._held.enter_context(hold(self.run_folder))

    def _clear(self) -> None:
        """See to it that a fit goes on with its own run or finds no other in its folder.

        Raises:
            ConfigError: The folder holds a run, and nothing says whether to continue or to replace it.
        """
        if not is_first_process() or not holds_run(self.run_folder):
            return
        checkpoint, start = self._value("ckpt_path"), self.model.init_from if isinstance(self.model, Method) else None
        own = checkpoint in CHECKPOINT_WORDS or (checkpoint is not None and _lies_in(checkpoint, self.run_folder))
        if self._overwrite:
            if own or self._requeued or (start is not None and _lies_in(start, self.run_folder)):
                raise ConfigError(
                    f"--overwrite puts the run in '{self.run_folder}' aside, but this fit goes on from it; leave "
                    "--overwrite out, or name another folder by --run."
                )
            log.info("The earlier run is kept as %s.", set_run_aside(self.run_folder))
        elif not own and not self._requeued:
            finished = is_finished(self.run_folder)
            go_on = (
                "train it longer with --ckpt_path last and more steps"
                if finished
                else "resume it with --ckpt_path last"
            )
            raise ConfigError(
                f"'{self.run_folder}' holds {'a finished' if finished else 'an unfinished'} run; {go_on}, begin anew "
                "with --overwrite (which keeps it as previous.1), or name another folder by --run."
            )

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return Path(str(self._value("run")))

    @property
    def _requeued(self) -> bool:
        """Whether Slurm has started this job again: Lightning then goes on from the checkpoint that it left."""
        return (
            self._value("ckpt_path") is None
            and SLURMEnvironment.detect()
            and next(self.run_folder.glob("hpc_ckpt_*.ckpt"), None) is not None
        )

    def resolve_start(self) -> None:
        """Leave the start (``init_from``) alone where a checkpoint replaces it; else see that it is there.

        Before Lightning prepares data, which may take minutes. ``last`` becomes the run's newest whole checkpoint;
        where there is none, a run begins.
        """
        checkpoint = self._settle_checkpoint()
        if not isinstance(self.model, Method):
            return
        if checkpoint is not None:
            self.model.continue_run()
        elif self.subcommand == "fit":
            self.model.check_start()

    def _settle_checkpoint(self) -> str | None:
        """What checkpoint is read, seen to be readable."""
        checkpoint = self._value("ckpt_path")
        if checkpoint == "last":
            found = newest_checkpoint(self.run_folder / FOLDER)
            checkpoint = None if found is None else str(found)
            if found is None and is_first_process():
                log.warning("--ckpt_path last: '%s' has no checkpoint, so this starts anew.", self.run_folder)
            self.config_init[self.subcommand]["ckpt_path"] = checkpoint
        elif checkpoint is not None and str(checkpoint) not in CHECKPOINT_WORDS and "://" not in str(checkpoint):
            checked_checkpoint(Path(str(checkpoint)), owner="ckpt_path")
        elif self._requeued:
            checkpoint = "hpc"
        return None if checkpoint is None else str(checkpoint)

    @property
    def _test_follows(self) -> bool:
        return bool(self._value("test_after_fit")) and (
            type(self.datamodule).test_dataloader is not L.LightningDataModule.test_dataloader
            and type(self.model).test_step is not L.LightningModule.test_step
        )

    def after_fit(self) -> None:
        """Score the final weights."""
        if self._test_follows and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)  # RunFolder prints the table

    def _value(self, key: str) -> Any:
        config = self.config.get(self.subcommand) if self.subcommand else self.config
        return config.get(key)


def run_lightning(arguments: list[str]) -> VisexpertCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    ``visexpert test RUN`` alone scores a finished run: its own configuration and last checkpoint are filled in.
    A ``--config`` beside it changes that configuration (for example by a phase to carry out).
    """
    again = "go on with the same command and --ckpt_path last" if arguments[:1] == ["fit"] else "give the command again"
    leave_logs_to_root()
    with stoppable(go_on=again), ExitStack() as held:
        return build_cli(complete_from_run(arguments), held=held)


def leave_logs_to_root() -> None:
    """Take Lightning's own handler away, which says again what the command line's says, without escapes."""
    logging.getLogger("lightning").handlers.clear()


def build_cli(arguments: list[str], *, run: bool = True, held: ExitStack | None = None) -> VisexpertCLI:
    """Parse, build and, with ``run``, carry out the subcommand that ``arguments`` begin with.

    Raises:
        ConfigError: An argument or a key of a configuration file that does not fit.
    """
    return VisexpertCLI(
        save_config_callback=SaveRunConfig,
        trainer_class=RunTrainer,
        trainer_defaults={"enable_model_summary": False},
        args=arguments,
        run=run,
        held=held,
    )


class RunParser(LightningArgumentParser):
    """Lightning's parser, whose errors are one sentence instead of the whole usage.

    Options are given in full. A class that takes the place of an unrelated one takes none of its settings over
    (:mod:`visexpert.overlays`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse a command line with its configuration files."""
        if not self.exit_on_error and args is not None:
            # A setting inside a class, which jsonargparse hands on as text: a null that it has read becomes 'None'.
            args = [f"{word.removesuffix('=None')}=null" if word.endswith("=None") else word for word in args]
        with unrelated_settings_dropped():
            return super().parse_args(args, *others, **kwargs)

    def dump(self, cfg: Any, *others: Any, **kwargs: Any) -> str:
        """Write a configuration as text; it was checked when it was parsed, and to check it again takes longest."""
        text: str = super().dump(cfg, *others, **{"skip_validation": True, **kwargs})
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ConfigError; parsers of nested classes report to this one, as they always do."""
        if not self.exit_on_error:
            super().error(message, ex)
        if parts := parts_without_class(message, classes_in(message)):
            raise MissingBaseError(parts) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        for action in parser._actions:
            if not action.option_strings and action.metavar:  # a positional is known by what help calls it
                message = message.replace(f"are required: {action.dest}", f"are required: {action.metavar}")
        raise ConfigError(explain(message, _settings_of(parser))) from ex


def _settings_of(parser: ArgumentParser) -> list[str]:
    """Settings that a user can give, as they stand in a file: neither positionals nor what only prints."""
    names = [name[2:] for action in parser._actions for name in action.option_strings if name.startswith("--")]
    names = [name for name in names if name not in _PRINTING and not name.endswith(".help")]
    groups = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name not in groups]


_PRINTING = ("help", "version", "print_config", "print_shtab")


def is_first_process() -> bool:
    """Whether this is the process that writes, of all that launchers have started; True where there is only one."""
    return not getattr(rank_zero_only, "rank", 0)


def _decides_answers(key: str) -> bool:
    """Whether a setting has a say in what ``predict`` writes for an image."""
    part, _, rest = key.partition(".")
    name = rest.rpartition(".")[2]
    if name in ("batch_size", "global_batch_size", "eval_batch_size", "num_workers", "worker_timeout"):
        return False
    return part in ("model", "data", "seed_everything") or key == "trainer.precision"


def _lies_in(path: str, folder: Path) -> bool:
    return "://" not in path and Path(path).resolve().is_relative_to(folder.resolve())


def default_callbacks() -> list[L.Callback]:
    """What every run carries: progress, throughput, metrics of earlier starts, run folder, cost, figures."""
    return [
        TrainingProgress(),
        ThroughputMonitor(),
        MetricsContinuation(),
        RunFolder(),
        CostReport(),
        RunFigures(),
        Predictions(),
        NearestNeighbors(),
        TextAlignment(),
    ]


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``: every so many steps, and at the end of training whatever the number of steps.

    Args:
        run: The run's folder.
        every_n_steps: Steps between two checkpoints.
    """

    def __init__(self, *, run: Path, every_n_steps: int) -> None:
        super().__init__(
            dirpath=run / FOLDER,
            filename="{step}",
            save_last=True,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,  # what the next command reads has one name
        )
        self._has_trained = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights; Lightning saves at multiples of ``every_n_steps`` only."""
        super().on_train_end(trainer, pl_module)
        self._has_trained = True
        trainer.save_checkpoint(f"{self.dirpath}/{LAST}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the weights of a fit that had no step left, if a kill came between their file and this one."""
        super().on_fit_end(trainer, pl_module)
        last = f"{self.dirpath}/{LAST}"
        if not self._has_trained and trainer.ckpt_path is not None and str(trainer.ckpt_path) != last:
            trainer.save_checkpoint(last)
