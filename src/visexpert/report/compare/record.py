"""A run's folder, read: its settings without what seeds may change, scores, environment, figures, and its end."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import read_yaml
from visexpert.io.run_files import read_json
from visexpert.report.curves import read_metrics
from visexpert.report.world import training_sets

PHASES = {"merge.json": "merge", "detachment.json": "detachment"}
"""Facts that a phase leaves in its folder, and what its settings are called here."""


Settings = Mapping[str, Any]
"""Settings by short dotted key, such as ``model.language.width`` or ``trainer.max_steps``; ``init_args`` left out."""

IGNORED = frozenset(
    """run config seed_everything verbose weights_only ckpt_path checkpoint_every test_after_fit
    trainer.logger trainer.default_root_dir trainer.enable_progress_bar trainer.enable_checkpointing
    trainer.enable_model_summary trainer.log_every_n_steps trainer.val_check_interval trainer.check_val_every_n_epoch
    trainer.num_sanity_val_steps trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy
    model.store.folder data.root data.rendering.progress data.num_workers data.worker_timeout
    data.rendering.workers data.order_seed data.eval_batch_size""".split()
)
"""Settings that do not make another variant: seeds, places, logging, and the machine."""

_SEED = re.compile(r"(?<![a-z0-9])(seed|s)[-_]?\d+(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Args:
        folder: Its folder.
        seed: Of training; None where neither configuration nor environment has one.
        settings: Flat, without seeds and places.
        metrics: Finite metrics by flat key.
        not_finite: Keys of metrics that are not finite.
        environment: ``environment.json``: stage to its facts.
        start: Checkpoint that its training began with, or that was scored without training, as configured.
        problem: Why it cannot be compared, in a few words; empty for a finished run.
        trained_on: Data sets, by class; empty where the configuration names none.
    """

    folder: Path
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    problem: str = ""
    trained_on: tuple[str, ...] = ()

    def fact(self, *path: str) -> Any:
        """A fact of the stage that scored it, else of the fit; None where neither has recorded it."""
        for stage in ("test", "fit", "validate"):
            value: Any = self.environment.get(stage)
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    def figure(self, name: str) -> Path | None:
        """A PNG of its ``figures/``, if it is there."""
        path = self.folder / "figures" / f"{name}.png"
        return path if path.is_file() else None


def find_runs(paths: Iterable[Path], *, phases: bool = False) -> tuple[list[Path], list[Path]]:
    """Run folders at or below the given paths, and those paths that hold none.

    A folder that is not a run is searched; a run's own folder is not, unless ``phases`` wants RUN/merged and the like.

    Raises:
        ConfigError: A path does not exist.
    """
    runs: list[Path] = []
    strays: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"'{path}' does not exist; give folders that `visexpert fit --run` wrote, or folders that contain them."
            )
        below = _runs_below(path, phases=phases)
        runs += below
        strays += [] if below else [path]
    return list(dict.fromkeys(runs)), strays


def is_run(folder: Path) -> bool:
    """Whether a folder has anything that a run leaves at its start."""
    names = ("config.yaml", "config.test.yaml", "config.validate.yaml", "environment.json", "metrics.json")
    return folder.is_dir() and any((folder / name).is_file() for name in names)


def read_run(folder: Path, *, split: str = "test") -> RunRecord:
    """Read a run's folder; record what is wrong with it as its ``problem``.

    Args:
        folder: The folder.
        split: Whose scores it must have: ``test`` or ``val``.
    """
    try:
        config, settings = _read_config(folder)
        environment = read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
        metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
        for name, content in (("environment.json", environment), ("metrics.json", metrics or {})):
            if not isinstance(content, dict):
                raise DataError(f"{name} holds a {type(content).__name__} where an object belongs")
    except (DataError, ValueError, OSError) as error:
        return RunRecord(folder, problem=f"cannot be read: {str(error).splitlines()[0]}")
    numbers = {key: value for key, value in (metrics or {}).items() if _is_number(value)}
    record = RunRecord(
        folder,
        _seed(config, environment),
        settings,
        {key: float(value) for key, value in numbers.items() if math.isfinite(value)},
        tuple(key for key, value in (metrics or {}).items() if value is None or not math.isfinite(numbers.get(key, 0))),
        environment,
        _start(config, environment),
        trained_on=training_sets(config),
    )
    return RunRecord(**{**vars(record), "problem": _problem(record, split, has_metrics=metrics is not None)})


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which seed10 comes after seed2."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _runs_below(path: Path, *, phases: bool) -> list[Path]:
    if is_run(path):
        return [path, *filter(is_run, _folders(path))] if phases else [path]
    return [run for child in _folders(path) for run in _runs_below(child, phases=phases)]


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted((child for child in path.iterdir() if child.is_dir() and not child.is_symlink()), key=natural)


def _read_config(folder: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The configuration of the fit, else of what scored it; flat, with the settings of a phase."""
    config: Any = {}
    for name in ("config.yaml", "config.test.yaml", "config.validate.yaml"):
        if (folder / name).is_file():
            config = read_yaml(folder / name)
            break
    if not isinstance(config, Mapping):
        raise DataError("its configuration is not a mapping")
    settings = flatten(config)
    phases = {phase: folder / name for name, phase in PHASES.items() if (folder / name).is_file()}
    settings["phase"] = ", ".join(phases) or "none"  # a phase may leave the configuration as it was
    for phase, path in phases.items():
        facts = read_json(path)
        told = facts.get("settings", facts)
        settings |= {f"{phase}.{key}": value for key, value in told.items() if key not in ("run", "weights")}
    return config, settings


def _seed(config: Mapping[str, Any], environment: Mapping[str, Any]) -> int | None:
    seeds = [config.get("seed_everything"), *((environment.get(stage) or {}).get("seed") for stage in ("fit", "test"))]
    found = [seed for seed in seeds if isinstance(seed, int) and not isinstance(seed, bool)]
    return found[0] if found else None


def _start(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str | None:
    """``init_from`` of a fit; for a folder that only scores, the checkpoint that it scored."""
    model = config.get("model")
    arguments = model.get("init_args") if isinstance(model, Mapping) else None
    start = arguments.get("init_from") if isinstance(arguments, Mapping) else None
    found = start if "fit" in environment else config.get("ckpt_path") or start
    return found if isinstance(found, str) else None


def _problem(record: RunRecord, split: str, *, has_metrics: bool) -> str:
    fit = record.environment.get("fit") or {}
    scoring = record.environment.get("test" if split == "test" else "fit") or {}
    scored = any(key.startswith(f"{split}/") for key in record.metrics)
    if fit.get("outcome") == "failed":
        return f"failed in training: {fit.get('error', 'no reason recorded')}; {_last_sign(record.folder)}"
    if fit.get("outcome") == "running":
        return f"still training, or killed: began {fit.get('time')}; {_last_sign(record.folder)}"
    if not scored and scoring.get("outcome") == "failed":
        return f"failed in scoring: {scoring.get('error', 'no reason recorded')}"
    if not has_metrics:
        return f"failed or still going: there is no metrics.json; {_last_sign(record.folder)}"
    if not scored:
        return f"has no {split} scores; score it by `visexpert {_VERBS.get(split, 'test')} {record.folder}`"
    steps, planned = record.metrics.get("cost/steps"), record.settings.get("trainer.max_steps")
    if fit.get("outcome") is None and fit and steps and isinstance(planned, int) and 0 < steps < planned:
        return f"scored after {steps:.0f} of {planned} steps: it was interrupted"
    return ""


_VERBS = {"val": "validate"}


def _last_sign(folder: Path) -> str:
    """Last step and time at which the run wrote its curve."""
    path = folder / "metrics.csv"
    try:
        curves = read_metrics(path)
        step = max(int(steps[-1]) for steps, _ in curves.values() if len(steps))
        when = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except (DataError, OSError, ValueError):
        return "it logged no step"
    return f"last logged step {step}, at {when:%Y-%m-%d %H:%M} UTC"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of a resolved configuration (``config.yaml`` of a run).

    An object becomes its class's last name under its own key and its arguments below it; a mapping or list of objects
    also gives its names, so that other experts or callbacks are another setting; an empty mapping is ``none``. Paths
    lose the number of a seed.
    """
    return {key: value for key, value in _walk("", config) if key not in IGNORED}


def differences(settings: Sequence[Settings]) -> dict[str, list[Any]]:
    """Settings that differ among runs, each with its value in every run.

    A setting that a run does not have is None there and no difference by itself: versions come with new settings, and
    an object of another class differs by its class.
    """
    keys = list(dict.fromkeys(key for each in settings for key in each))
    found = {}
    for key in keys:
        present = {shown(each[key]) for each in settings if key in each}
        if len(present) > 1:
            found[key] = [each.get(key) for each in settings]
    return found


def shown(value: Any) -> str:
    """Return a value in a word: lists in brackets, None as ``null``."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).strip('"')


def without_seed(path: str) -> str:
    """A path with the number of its seed replaced, from here on: ``runs/tove/seed*/checkpoints/last.ckpt``."""
    return _SEED.sub(lambda match: f"{match[1]}*", path.removeprefix(f"{os.getcwd()}{os.sep}"))


def _walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield prefix, str(value["class_path"]).rpartition(".")[2]
        for key, item in (value.get("init_args") or {}).items():
            yield from _walk(_join(prefix, key), item)
    elif isinstance(value, Mapping):
        if _are_objects(value.values()) or (prefix and not value):
            yield prefix, ", ".join(map(str, value)) or "none"
        for key, item in value.items():
            yield from _walk(_join(prefix, key), item)
    elif isinstance(value, list | tuple) and value and _are_objects(value):
        yield prefix, ", ".join(str(item["class_path"]).rpartition(".")[2] for item in value)
        for item in value:
            yield from _walk(_join(prefix, str(item["class_path"]).rpartition(".")[2]), item)
    else:
        yield prefix, without_seed(value) if isinstance(value, str) else value


def _are_objects(items: Any) -> bool:
    return bool(items) and all(isinstance(item, Mapping) and "class_path" in item for item in items)


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
