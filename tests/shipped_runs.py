"""Runs of the files under configs/ as they are shipped, in two optimizer steps: one parser, one cache, one folder.

A run is named by the command that makes it, and made once: what another goes on from, or several tests look at.

Only sizes, devices and numbers of steps are replaced, and METEOR is off, which needs Java. Data lie where the files
say, under a folder of the test's own; published models lie in a Hugging Face Hub cache under their names, small and
with random weights. Figures are built but not painted.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.plugins import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.header_commands import Command, needed_by
from tests.io.hub import put_in_cache
from tests.tiny_configs import write_data, write_models
from visexpert import shipped
from visexpert.callbacks import Phase
from visexpert.callbacks.subsets import SubsetTiming
from visexpert.cli import main
from visexpert.methods.checkpointed import CheckpointedModule
from visexpert.training import VisexpertCLI, build_cli

STEPS = 2
"""Optimizer steps of a run."""

NORM = 10.0
"""What gradients are scaled to before they are clipped, so that every clipping has something to do."""

LIMITS: dict[str, float] = {
    "batch_size": 2,
    "global_batch_size": 2,
    "eval_batch_size": 2,
    "num_workers": 0,
    "workers": 0,
    "num_train": 24,
    "num_val": 4,
    "num_test": 4,
    "max_steps": STEPS,
    "steps": STEPS,
    "val_check_interval": STEPS,
    "eval_every": STEPS,
    "checkpoint_every": STEPS,
    "warmup_steps": 1,
    "language_frozen_steps": 1,
    "map_size": 16,
    "adapter_hidden": 32,
    "devices": 1,
    "num_nodes": 1,
    "caption_images": 2,
    "timing_images": 1,
    "timing_seconds": 0,
}
"""Settings that are cut down to these wherever they are larger, in whatever class."""


class EngineLikePrecision(DeepSpeedPrecision):
    """Lightning's plugin for DeepSpeed around what the engine does, which needs a GPU.

    Weights are in 16 bits without autocast, the optimizer has float32 masters of them, and gradients are clipped by
    the engine alone, which gets ``gradient_clip_val`` from Lightning's strategy.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        self._masters: dict[nn.Parameter, Tensor] = {}
        return super().convert_module(module).to(self._desired_dtype)

    backward = Precision.backward

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        closure()
        self._after_closure(model, optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = self._masters.get(parameter, parameter.data).float()
            parameter.grad = None if gradient is None else gradient.float()
        nn.utils.clip_grad_norm_(parameters, model.trainer.gradient_clip_val or float("inf"))
        optimizer.step(**kwargs)
        for parameter in parameters:
            self._masters[parameter], parameter.grad = parameter.data, None
            parameter.data = parameter.data.to(self._desired_dtype)


class EngineLike(DeepSpeedStrategy):
    """A DeepSpeedStrategy of one process whose model is not wrapped; see :class:`EngineLikePrecision`."""

    def __init__(self, stage: int) -> None:
        DDPStrategy.__init__(self)
        self.stage = stage

    setup_environment = Strategy.setup_environment
    setup = Strategy.setup
    setup_optimizers = Strategy.setup_optimizers
    save_checkpoint = Strategy.save_checkpoint
    tensor_init_context = Strategy.tensor_init_context
    model_sharded_context = Strategy.model_sharded_context
    handles_gradient_accumulation = Strategy.handles_gradient_accumulation
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup


@dataclass
class Group:
    """What became of a group of the optimizer.

    Args:
        moved: Names of parameters that a step has changed.
        still: Of the others.
        lr: Highest rate.
    """

    moved: set[str] = field(default_factory=set)
    still: set[str] = field(default_factory=set)
    lr: float = 0.0


class Watch(Callback):
    """Looks at each optimizer step where it is taken: clipped gradients, what moves and what must not."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.groups: dict[str, Group] = {}
        self.changed: set[str] = set()
        self._before: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = {name: value.clone() for name, value in _must_stay(pl_module).items()}
        optimizer, names = trainer.optimizers[0], {p: name for name, p in pl_module.named_parameters()}
        optimizer.register_step_pre_hook(lambda given, *_: self._keep(given, names))
        optimizer.register_step_post_hook(lambda given, *_: self._look(given, names))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        gradients = _gradients(optimizer)
        factor = NORM / _norm(gradients)
        for gradient in gradients:
            gradient.mul_(factor)

    def _keep(self, optimizer: Optimizer, names: dict[Any, str]) -> None:
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._before = {names[parameter]: parameter.detach().clone() for parameter in given}

    def _look(self, optimizer: Optimizer, names: dict[Any, str]) -> None:
        self.norms.append(_norm(_gradients(optimizer)))
        for group in optimizer.param_groups:
            known = self.groups.setdefault(group["name"] if "name" in group else str(group["weight_decay"]), Group())
            known.lr = max(known.lr, group["lr"])
            for parameter in group["params"]:
                same = torch.equal(parameter, self._before[names[parameter]])
                (known.still if same else known.moved).add(names[parameter])
            known.still -= known.moved

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        end = _must_stay(pl_module)
        self.changed = {name for name, value in self._start.items() if not torch.equal(value, end[name])}
        self._start, self._before = {}, {}


def _must_stay(module: L.LightningModule) -> dict[str, Tensor]:
    """What no optimizer has, and all that is in frozen parts, buffers included."""
    frozen = tuple(f"{name}." for name in module.frozen_modules()) if isinstance(module, CheckpointedModule) else ()
    trained = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    stay = {name: p.detach() for name, p in module.named_parameters() if id(p) not in trained}
    buffers = {name: buffer for name, buffer in module.named_buffers() if name.startswith(frozen)} if frozen else {}
    return {**stay, **buffers}


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())


@dataclass(frozen=True)
class Run:
    """A run that was carried out.

    Args:
        folder: Its folder.
        steps: Optimizer steps.
        finished: Whether the trainer says that it is done.
        phases: Names of the phases that took part.
        watch: What was seen of its steps.
        clip: What the configuration clips gradients to; None for nothing.
    """

    folder: Path
    steps: int
    finished: bool
    phases: Sequence[str]
    watch: Watch
    clip: float | None


@dataclass(frozen=True)
class Steps:
    """Two steps that were taken without a run around them.

    Args:
        losses: Logged losses.
        watch: What was seen of the steps.
        clip: What the configuration clips gradients to; None for nothing.
    """

    losses: Mapping[str, float]
    watch: Watch
    clip: float | None


BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
"""Settings of a trainer that takes steps and does nothing else."""


class OneParser(VisexpertCLI):
    """The command line, whose parser is built once and used for many runs: building it takes longer than a run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Wait for :meth:`carry_out`."""

    def parsed(self, command: Command) -> Namespace:
        """The configuration of ``fit`` with these arguments."""
        self.parse_arguments(self.parser, shipped.in_arguments(command))
        config: Namespace = self.config
        return config

    def carry_out(self, config: Namespace, watch: Watch) -> None:
        """Fit, as the command line would."""
        self.config, self.subcommand = config, "fit"
        self._set_seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        super()._run_subcommand("fit")

    def bare_steps(self, config: Namespace, watch: Watch) -> dict[str, float]:
        """Train by Lightning's own trainer with the configuration's settings, and return the logged losses."""
        self.config, self.subcommand = config, "fit"
        self._set_seed()
        given = Namespace(model=config["fit.model"], data=config["fit.data"])  # type: ignore[no-untyped-call]
        parts = self.parser.instantiate_classes(Namespace(fit=given))  # type: ignore[no-untyped-call]
        trainer = L.Trainer(**{**config["fit.trainer"].as_dict(), **BARE, "callbacks": [watch]})
        trainer.fit(parts["fit.model"], datamodule=parts["fit.data"])
        assert trainer.global_step == STEPS and trainer.state.finished
        return {name: float(value) for name, value in trainer.callback_metrics.items() if "loss" in name}


class ShippedRuns:
    """Carries out commands on files under configs/, each once, and first what they go on from.

    Args:
        root: Empty folder; becomes the working directory.
        patch: Undoes all that is set here.
        makers: By folder of a run, the command that makes it.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, makers: Mapping[str, Command]) -> None:
        self._makers, self._done = makers, set[Command]()
        self._runs = dict[Command, Run]()
        self._settings = dict[Command, Mapping[str, Any]]()
        self._parsed = dict[Command, Namespace]()
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("VISEXPERT_CACHE", str(root / "cache"))
        patch.setattr("sys.argv", ["visexpert"])
        (root / "models").mkdir()
        for name, place in write_models(root / "models").items():
            if Path(place).is_dir():
                put_in_cache(patch, root / "hub", name, Path(place))
        write_data(root / "data")
        _leave_one_batch_of_text(root / "data" / "llava-instruct" / "llava_v1_5_mix665k.json")
        (root / "src" / "visexpert").mkdir(parents=True, exist_ok=True)  # configs/zoo writes into a checkout
        patch.chdir(root)
        for stage in (2, 3):
            patch.setitem(StrategyRegistry[f"deepspeed_stage_{stage}"], "strategy", EngineLike)
        patch.setattr(accelerator_connector, "DeepSpeedPrecision", EngineLikePrecision)
        patch.setattr("visexpert.training.check_machine", lambda trainer: None)  # which misses DeepSpeed itself
        patch.setitem(vars(SubsetTiming)["__init__"].__kwdefaults__, "turns", 1)
        with pytest.MonkeyPatch.context() as building:
            building.setattr("visexpert.training.VisexpertCLI", OneParser)
            cli = build_cli(["fit", "--config", "tove/smoke"])
        assert isinstance(cli, OneParser)
        self._cli = cli

    def carry_out(self, command: Command) -> None:
        """Run a command with few steps, unless it was run."""
        if command in self._done:
            return
        needed = needed_by(command)
        if needed is not None:
            self.carry_out(self._makers[needed])
        self._done.add(command)
        if command[0] == "fit":
            self._runs[command] = self._fit(command)
            return
        with _cleaned_up():
            main(shortened(command))

    def run(self, command: Command) -> Run:
        """What became of a ``fit``."""
        self.carry_out(command)
        return self._runs[command]

    def steps(self, command: Command) -> Steps:
        """Take two steps without what surrounds them: no file is written, and no callback but the watch takes part."""
        needed = needed_by(command)
        if needed is not None:
            self.carry_out(self._makers[needed])
        given, watch = self._shrunk(command), Watch()
        with _cleaned_up():
            losses = self._cli.bare_steps(given, watch)
        return Steps(losses, watch, given["fit"]["trainer"]["gradient_clip_val"])

    def settings(self, command: Command) -> Mapping[str, Any]:
        """All settings of a ``fit``, before they are cut down; without a fit."""
        if command not in self._settings:
            self._parsed[command] = self._cli.parsed(command)
            self._settings[command] = _settings_of(self._parsed[command])
        return self._settings[command]

    def is_known(self, command: Command) -> bool:
        """Whether a run was carried out whose settings differ in the model's alone, and which had no callbacks.

        All that a run has around its steps is then tried: trainer, data, checkpoints, tables and figures.
        """
        around = _around(self.settings(command))
        return (
            any(_around(self._settings[done]) == around for done in self._runs) and not around["trainer"]["callbacks"]
        )

    def _shrunk(self, command: Command) -> Namespace:
        """The configuration, cut down."""
        self.settings(command)
        config = self._parsed.pop(command, None) or self._cli.parsed(command)
        given = config["fit"]
        shrink(given)
        if "evaluation" in given["model"]["init_args"]:
            given["model"]["init_args"]["evaluation"]["meteor"] = False  # phases score, and this one needs Java
        given["trainer"]["accelerator"], given["trainer"]["log_every_n_steps"] = "cpu", 1
        return config

    def _fit(self, command: Command) -> Run:
        config, watch = self._shrunk(command), Watch()
        given = config["fit"]
        with _cleaned_up():
            self._cli.carry_out(config, watch)
        trainer = self._cli.trainer
        assert isinstance(trainer, L.Trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return Run(
            Path(given["run"]).absolute(),
            trainer.global_step,
            trainer.state.finished,
            [callback.name for callback in callbacks if isinstance(callback, Phase)],  # callbacks hold models
            watch,
            given["trainer"]["gradient_clip_val"],
        )


def shortened(command: Command) -> list[str]:
    """A command on a run with few steps, where it has or would take many."""
    if command[0] not in SHORT:
        return list(command)
    steps, others = SHORT[command[0]]
    found = [str(STEPS) if flag == steps else word for flag, word in zip(("", *command), command, strict=False)]
    return [*found, *(() if steps in command else (steps, str(STEPS))), *others]


SHORT = {
    "merge": ("--steps", ("--optimizer.warmup_steps", "1")),
    "detach": ("--retune_steps", ("--timing_seconds", "0.01", "--timing_images", "1")),
}
"""Of commands that train by themselves, the option for their steps, and what else takes long."""


@contextmanager
def _cleaned_up() -> Iterator[None]:
    """End the process group of a run, and take back what it set in the environment."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def _settings_of(config: Namespace) -> Mapping[str, Any]:
    """What ``fit`` is given, but for the names of its files; a copy, since a configuration is cut down in place."""
    return copy.deepcopy({name: value for name, value in config["fit"].as_dict().items() if name != "config"})


def _around(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings but the model's own and the folder's name."""
    return {**settings, "model": settings["model"]["class_path"], "run": None}


def _leave_one_batch_of_text(path: Path) -> None:
    """Of conversations without an image keep two, so that of two steps one sees images."""
    records = json.loads(path.read_text(encoding="utf-8"))
    text = [record for record in records if "image" not in record]
    path.write_text(json.dumps([record for record in records if record not in text[2:]]), encoding="utf-8")


def shrink(value: Any) -> None:
    """Cut down what is large, in place, by what each class offers for it; classes stay."""
    if isinstance(value, list):
        for entry in value:
            shrink(entry)
    if not isinstance(value, Namespace | dict):
        return
    kind = str(value.get("class_path") or "").rpartition(".")[2]
    if kind in SHRUNK:
        SHRUNK[kind](value["init_args"])
    for key, entry in list(vars(value).items() if isinstance(value, Namespace) else value.items()):
        if key in LIMITS and isinstance(entry, int | float) and not isinstance(entry, bool):
            value[key] = min(entry, LIMITS[key])
        else:
            shrink(entry)


def _shrink_timm(given: Any) -> None:
    convolutional = "convnext" in given["model"]
    small = {"depths": [1] * 4, "dims": [8] * 4} if convolutional else {"depth": 2, "embed_dim": 32, "num_heads": 2}
    given["arguments"] = {**(given["arguments"] or {}), **small}
    patch = given["arguments"].get("patch_size", 14)
    given["weights"], given["image_size"] = "random", 64 if convolutional else 4 * patch


def _shrink_published(given: Any) -> None:
    """What a file says of a model that is not there yet: the small one in the cache says it itself."""
    for name in ("architecture", "config", "processor"):
        if given.get("source") and given.get(name) is not None and not given["source"].startswith("zoo:"):
            given[name] = None


def _shrink_published_timm(given: Any) -> None:
    if given.get("source"):
        given["model"], given["image_size"] = None, None


def _shrink_images(given: Any) -> None:
    given["image_size"] = 64
    if given.get("max_tokens"):
        given["max_tokens"] = 96  # the small tokenizer knows letters, hardly any words


def _shrink_shards(given: Any) -> None:
    given["train"] = given["train"].replace("{00000..00331}", "{00000..00001}")


SHRUNK: dict[str, Callable[[Any], None]] = {
    "TimmExpert": _shrink_timm,
    "TransformersExpert": _shrink_published,
    "DepthExpert": _shrink_published,
    "ClipEncoder": _shrink_published,
    "TransformersEncoder": _shrink_published,
    "TimmEncoder": _shrink_published_timm,
    "ImageTable": _shrink_images,
    "TiledClipEncoder": _shrink_published,
    "KorniaEdges": _shrink_images,
    "LLaVAInstruct": _shrink_images,
    "MixedData": _shrink_images,
    "CC3M": _shrink_shards,
}
