"""Checks of a configuration before anything is built from it: what the parser lets through and no class can use."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml

from visexpert.errors import (
    ConfigError,
    UserError,
    causes,
    did_you_mean,
    first_line,
    missing_package,
    nearest,
    require_numbers,
    told_by_machine,
    user_error_in,
)
from visexpert.io.reading import read_text, read_yaml

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Largest integer that tensors and optimizers hold."""

LARGEST_SEED = 2**32 - 1

_NEGATIVE = frozenset({"layer", "length_penalty"})
"""Settings of our own classes that count from the end, or have a sign."""

_OURS = "visexpert."


def check_config_file(path: Path) -> None:
    """Check that a file is a configuration at all, and say in which file and line it is not.

    Raises:
        ConfigError: It is missing, no regular file, no YAML, or no mapping with settings.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"The configuration '{path}' does not exist; correct the path.") from None
    except OSError as error:
        if path.is_dir():
            inside = path / "config.yaml"
            meant = f"that of this run is {inside}" if inside.is_file() else "name a YAML file"
            raise ConfigError(f"The configuration '{path}' is a folder; {meant}.") from None
        raise ConfigError(f"The configuration '{path}' cannot be read ({error.strerror}); name a YAML file.") from None
    except ValueError as error:
        raise ConfigError(f"The configuration '{path}' cannot be read as YAML ({error}); mend it.") from None
    if not isinstance(content, dict) or not content:
        kind = "empty" if not content else f"a {type(content).__name__}"
        raise ConfigError(f"The configuration '{path}' is {kind}, but must be a mapping such as 'model: ...'.")
    if (line := _unfinished_line(yaml.compose(read_text(path)), set())) is not None:
        raise ConfigError(f"The configuration '{path}' is not finished: nothing stands below the key in line {line}.")
    for key in ("trainer", "model", "data"):
        if not isinstance(content.get(key, {}), dict | str):
            raise ConfigError(f"{path}: {key} is {content[key]!r}, but must be a mapping of settings.")


def _unfinished_line(node: yaml.Node | None, seen: set[int]) -> int | None:
    """The first line with a class_path or init_args that holds nothing, as where a file breaks off."""
    if id(node) in seen:  # an alias, perhaps of what it lies in
        return None
    seen.add(id(node))
    below: list[yaml.Node] = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value in ("class_path", "init_args") and value.tag.endswith(":null"):
                return int(key.start_mark.line) + 1
        below = [value for _, value in node.value]
    return next((line for part in below if (line := _unfinished_line(part, seen)) is not None), None)


def check_settings(config: Mapping[str, Any]) -> None:
    """Check what classes are given: no null where a type refuses it, no number that is not finite or too large.

    Settings of this package's classes are not negative, but for :data:`_NEGATIVE`.

    Args:
        config: Parsed settings; a mapping with ``class_path`` names a class.

    Raises:
        ConfigError: A value cannot be used.
    """
    for name, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{name} is {value:.6g}, but must be a finite number up to {LARGEST}.")
    for class_path, arguments in _classes(config):
        parameters, hints = _signature(class_path)
        _check_arguments(class_path, "", arguments, parameters, hints)


def check_seed(name: str, seed: Any) -> None:
    """Check that all libraries take a seed.

    Raises:
        ConfigError: It is no whole number, or out of their range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"{name} is {seed!r}, but must be a whole number from 0 to {LARGEST_SEED}.")


def check_run(config: Mapping[str, Any], *, trains: bool) -> None:
    """Check what belongs to the run: seed, folder, intervals of checkpoints, the trainer's numbers.

    Args:
        config: Settings of one subcommand.
        trains: Whether it is ``fit``.

    Raises:
        ConfigError: A value cannot be used.
    """
    for key, base in (("model", "LightningModule"), ("data", "LightningDataModule")):
        if str((config.get(key) or {}).get("class_path", "")).endswith(f".{base}"):
            raise ConfigError(f"{key} names no class; give one as {key}: {{class_path: ..., init_args: ...}}.")
    check_seed("seed_everything", config.get("seed_everything"))
    folder = config.get("run")
    if not isinstance(folder, str) or not folder.strip() or "\0" in folder:
        raise ConfigError(f"run is {folder!r}, but must name the folder of the run, such as runs/first.")
    every = config.get("checkpoint_every")
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"checkpoint_every is {every}, but must be at least 1 step.")
    given = config.get("trainer")
    trainer = given if isinstance(given, Mapping) else vars(given) if given else {}
    _check_trainer(trainer, trains=trains)
    _check_trainer_words(trainer)


def check_machine(trainer: Mapping[str, Any]) -> None:
    """Check that the machine has what the trainer asks for.

    Raises:
        ConfigError: There is no GPU, or DeepSpeed is not installed.
    """
    import torch  # heavy: what reads a configuration alone needs none

    strategy = trainer.get("strategy")
    name = str(strategy.get("class_path") if isinstance(strategy, Mapping) else strategy or "")
    if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator is {trainer['accelerator']}, but this machine has no GPU that PyTorch sees; to try "
            "the configuration here, add --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1 "
            "--trainer.strategy auto --trainer.precision 32-true."
        )
    if "deepspeed" in name.lower() and find_spec("deepspeed") is None:
        raise ConfigError(
            f"trainer.strategy is {name}, but DeepSpeed is not installed; install it with pip install "
            "'visexpert[deepspeed]', or add --trainer.strategy ddp (more memory per GPU) or fsdp."
        )


def built(build: Callable[[], T], *, who: str = "A setting") -> T:
    """What ``build`` makes of settings; whatever a constructor raises is about them, and becomes one sentence.

    Args:
        build: Builds.
        who: What is built, for the message, where the error does not name a class.

    Raises:
        UserError: The constructor's own, or a sentence that names class, error and message.
    """
    try:
        return build()
    except Exception as error:
        own = user_error_in(error)
        if isinstance(own, UserError):
            raise own from None
        raise told_by_machine(error) or ConfigError(_refused(error, who)) from error


def _refused(error: BaseException, who: str) -> str:
    """What class refused its settings, or misses a package, and why."""
    chain = list(causes(error))
    wrappers = ("Problem with given class_path", "Does not validate against", "Parser key", "Not a valid subclass")
    told = next((cause for cause in chain if not str(cause).strip().startswith(wrappers)), None)
    named = _named_in(error)
    owner = (_constructor(told) if told else None) or (named[0] if named else who)
    if missed := missing_package(error):
        return f"{owner} {missed}"
    text = f"{type(told).__name__}: {first_line(told)}" if told else named[1] if named else first_line(chain[-1])
    return f"{owner} cannot be built from its settings ({text.rstrip('.')}); change them."


def _named_in(error: BaseException) -> tuple[str, str] | None:
    """The innermost class that a parser names in its report, and what it says of it.

    Of a class in a list, such as one logger of several, the report is all that is left of the constructor's error.
    """
    wrapped = r"(?!Problem with|Does not|Parser key|- )"
    pattern = rf"Problem with given class_path '([^']+)':\s*\n\s+{wrapped}(.+)"
    found = [pair for cause in causes(error) for pair in re.findall(pattern, str(cause))]
    return found[-1] if found else None


def _constructor(error: BaseException) -> str | None:
    """The innermost class, of this package or of the user's, in whose constructor an error was raised."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        own = frame.f_code.co_name == "__init__" and "site-packages" not in frame.f_code.co_filename
        if own and owner is not None:
            found = f"{type(owner).__module__}.{type(owner).__qualname__}"
    return found


SCORED = {"validate": "val", "test": "test"}
"""Part of the data that a command scores."""


def check_has_part(data: object, part: str, *, command: str) -> None:
    """Refuse a command whose part of the data is not there: Lightning would end without a word.

    Args:
        data: The data module; one that does not tell its parts passes.
        part: ``val`` or ``test``.
        command: What was asked for.

    Raises:
        ConfigError: There is no such part.
    """
    has_part = getattr(data, "has_part", None)
    if has_part is not None and not has_part(part):
        raise ConfigError(
            f"{command} scores the {part} part of the data, but {type(data).__name__} has none; give it one, or name "
            "data that has."
        )


PROFILERS = ("simple", "advanced", "pytorch", "xla")
"""Names that Lightning's trainer takes for a profiler, which it keeps inside a function."""


def _check_trainer_words(trainer: Mapping[str, Any]) -> None:
    """Words that Lightning answers at length, or without the name of the setting.

    Raises:
        ConfigError: A word is none of those that Lightning registers, or no number of devices or time.
    """
    words = [name for name in ("accelerator", "strategy", "profiler", "gradient_clip_algorithm") if trainer.get(name)]
    for name in words:
        value, allowed = trainer[name], _trainer_words(name)
        if isinstance(value, str) and value not in allowed and "." not in value:
            near = did_you_mean(nearest(value, allowed))
            raise ConfigError(
                f"trainer.{name} is {value!r}, but must be one of {', '.join(allowed)}{f'; {near}' if near else '.'}"
            )
    devices, time = trainer.get("devices"), trainer.get("max_time")
    ids = isinstance(devices, str) and re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)*,?", devices.replace(" ", ""))
    if devices == 0 or devices == "0" or (isinstance(devices, str) and not ids):
        raise ConfigError(
            f"trainer.devices is {devices!r}, but must be auto, a number from 1, or the numbers of single devices, "
            "such as [0, 1]."
        )
    if isinstance(time, str) and not re.fullmatch(r"\s*\d+:\d\d:\d\d:\d\d\s*", time):
        raise ConfigError(f"trainer.max_time is {time!r}, but must be DD:HH:MM:SS, such as 00:12:00:00.")


def _trainer_words(name: str) -> list[str]:
    """Return what Lightning registers for a setting of its trainer, in order."""
    from lightning.pytorch.accelerators import AcceleratorRegistry  # heavy: what reads a configuration alone needs none
    from lightning.pytorch.strategies import StrategyRegistry
    from lightning.pytorch.utilities import GradClipAlgorithmType

    if name == "accelerator":
        return ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    if name == "strategy":
        return ["auto", *sorted(StrategyRegistry.available_strategies())]
    return list(PROFILERS) if name == "profiler" else sorted(GradClipAlgorithmType.supported_types())


def _check_trainer(trainer: Mapping[str, Any], *, trains: bool) -> None:
    """Numbers that Lightning takes without a word and trips over later, or that mean no training at all."""
    least = {
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "log_every_n_steps": 0,
        "num_nodes": 1,
        "gradient_clip_val": 0,
        "num_sanity_val_steps": -1,
        "min_steps": 0,
        "min_epochs": 0,
    }
    above = {"val_check_interval": 0, **({"limit_train_batches": 0} if trains else {})}
    for name in (*least, *above):
        value = trainer.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            require_numbers("trainer", least=least.get(name), above=above.get(name), **{name: value})
    interval = trainer.get("val_check_interval")
    if isinstance(interval, float) and interval > 1:
        raise ConfigError(
            f"trainer: val_check_interval is {interval}, but must be a share of an epoch in (0, 1], or a whole number "
            f"of batches, such as {round(interval)}."
        )
    steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    for name, value in (("max_steps", steps), ("max_epochs", epochs)):
        if value is not None and (value < -1 or (value == 0 and trains)):
            raise ConfigError(f"trainer: {name} is {value}, but must be at least 1, or -1 for no limit.")
    if trains and steps == -1 and epochs is None and not (trainer.get("max_time") or trainer.get("fast_dev_run")):
        raise ConfigError(
            "trainer: nothing ends the training (max_steps is -1); set max_steps, max_epochs or max_time "
            "(max_epochs: -1 trains until it is stopped)."
        )


def _classes(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every class that a configuration names, with its arguments."""
    if isinstance(value, Mapping):
        class_path, arguments = value.get("class_path"), value.get("init_args")
        if isinstance(class_path, str) and isinstance(arguments, Mapping):
            yield class_path, arguments
        for part in value.values():
            yield from _classes(part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            yield from _classes(part)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value, with the dotted name under which it would be given on the command line."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            yield from _leaves(part, name)
    else:
        yield name, value


def _check_arguments(
    class_path: str,
    group: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
) -> None:
    """Check the arguments of a class or, where ``group`` is ``name.``, those of its settings of that name."""
    for name, value in arguments.items():
        settings = next((kind for kind in _members(hints.get(name)) if dataclasses.is_dataclass(kind)), None)
        if isinstance(settings, type) and isinstance(value, Mapping):
            inner = inspect.signature(settings).parameters
            _check_arguments(class_path, f"{group}{name}.", value, inner, typing.get_type_hints(settings))
            continue
        if value is None and name in hints and parameters[name].default is not None and not _takes_none(hints[name]):
            default = parameters[name].default
            hint = "" if default is inspect.Parameter.empty else f", or leave it out for {default!r}"
            raise ConfigError(f"{class_path}: {group}{name} is null, but must have a value; give one{hint}.")
        numbers = value if isinstance(value, list | tuple) else [value]
        negative = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and n < 0]
        if negative and class_path.startswith(_OURS) and name in parameters and name not in _NEGATIVE:
            raise ConfigError(f"{class_path}: {group}{name} is {value}, but must not be negative.")


def _signature(class_path: str) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters and types of a class's constructor, those that it passes on to its bases among them."""
    module, _, name = class_path.rpartition(".")
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # a class inside a class, or a short name of Lightning's
        return parameters, hints
    for base in reversed(inspect.getmro(target)) if inspect.isclass(target) else (target,):
        function = base.__dict__.get("__init__") if inspect.isclass(base) else base
        if inspect.isfunction(function):
            parameters.update(inspect.signature(function).parameters)
            try:
                hints.update(typing.get_type_hints(function))
            except Exception:  # names that exist for type checkers alone
                continue
    return parameters, hints


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _takes_none(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_takes_none(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return None in typing.get_args(hint)
    if origin is typing.Annotated:
        return _takes_none(typing.get_args(hint)[0])
    return hint in (Any, object, None, type(None)) or isinstance(hint, TypeVar)
