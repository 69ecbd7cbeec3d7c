"""What a parser reports of a wrong setting, in one sentence: which key or class is wrong, and what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from visexpert.errors import did_you_mean, missing_package, nearest
from visexpert.overlays import load_path
from visexpert.trust import may_import

EARLIER = {
    "adapter_hidden": "hidden",
    "anchor_share": "clip_teacher_weight",
    "detach_weights": "detach",
    "direction": "alignment",
    "eval_mixture": "eval",
    "feature_cache": "folder",
    "feature_dtype": "dtype",
    "gate_hidden": "hidden",
    "gate_noise": "noise",
    "gate_noise_std": "noise_std",
    "learning_rate": "lr",
    "min_worth": "min_contribution",
    "mixture": "train",
    "normalize": "normalize",
    "projector_norm": "norm",
    "render_workers": "workers",
    "teacher_weighting": "teachers",
    "text_weight": "lm_weight",
    "token_weighting": "tokens",
}
"""What settings are called now, by names that they had in 0.1 or have elsewhere: for hints alone."""


def explain(message: str, known: Iterable[str]) -> str:
    """Turn jsonargparse's report into one sentence.

    Args:
        message: The report; nested classes and each member of a union add lines of their own.
        known: Keys that the parser knows.
    """
    classes = classes_in(message)
    told = (
        _unknown(message, classes, known)
        or _no_class(message, classes)
        or _group_as_value(message, classes)
        or _missing(message, classes)
        or _not_allowed(message, classes)
    )
    if told is not None:
        return told
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = " ".join(line for line in lines if line and not line.startswith(_NOISE))
    kept = re.sub(r"Parser key \"([^\"]+)\"", r"\1", re.sub(r"Problem with given class_path '([^']+)'", r"\1", kept))
    given = re.findall(r"Given value: (.{1,80})$", message, flags=re.MULTILINE)
    kept += f". Got value: {given[0]}" if given and "Got value" not in kept else ""
    return f"{kept[:400].rstrip('.')}; see --help for what is allowed."


def classes_in(message: str) -> list[str]:
    """Classes that a report finds wrong, the innermost last."""
    return re.findall(r"Problem with given class_path '([^']+)'", message)


_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass",
    "Subclass types expect one of",
    "a class path (str)",
    "a dict with",
)
"""How lines of a report begin that tell a user nothing."""

_PLACES = {
    "callbacks": ("lightning.pytorch.callbacks", "visexpert.callbacks"),
    "clip": ("visexpert.vision",),
    "data": ("visexpert.data", "visexpert.tabletop"),
    "experts": ("visexpert.experts", "visexpert.tabletop"),
    "language": ("visexpert.language",),
    "logger": ("lightning.pytorch.loggers",),
    "model": ("visexpert.methods",),
    "plugins": ("lightning.pytorch.plugins",),
    "profiler": ("lightning.pytorch.profilers",),
    "strategy": ("lightning.pytorch.strategies",),
}
"""Modules whose classes a setting of this name takes."""

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "Sequence": "a list, such as [1, 2]",
    "dict": "a mapping, such as {name: value}",
}


def _unknown(message: str, classes: list[str], known: Iterable[str]) -> str | None:
    """The sentence for a setting that does not exist."""
    unknown = re.search(
        r"[Oo]ption '([^']+)' is not accepted|not accept option '([^']+)'|unrecognized arguments: --([\w.-]+)", message
    )
    if unknown is None:
        return None
    name = next(group for group in unknown.groups() if group)
    if not classes and name == "version":
        return "--version is of no command; type visexpert --version."
    if not classes:
        return f"There is no setting '{name}'; {_hint(name, known)}"
    known_there = _settings_of(load_path(classes[-1]))
    first = name.split(".")[0]
    name = name if any(key.startswith(f"{first}.") for key in known_there) else first
    return f"{classes[-1]} has no setting '{name}'; {_hint(name, known_there)}"


def _no_class(message: str, classes: list[str]) -> str | None:
    """The sentence for a class that does not exist, named in full or by its last name alone."""
    if classes and load_path(classes[-1]) is None:
        module, _, name = classes[-1].rpartition(".")
        if missed := _missed_by(module):
            return f"{classes[-1]} {missed}"
        return f"There is no class '{classes[-1]}'; {_hint(name, getattr(load_path(module), '__all__', ()))}"
    bare = re.search(r"Expected a dot import path string: (\S+)", message)
    if bare is None:
        return None
    path = _key_in(message)
    places = next((_PLACES[part] for part in reversed(path.split(".")) if part in _PLACES), ())
    names = [name for place in places for name in _classes_of(place)]
    return f"{path}: there is no class '{bare[1]}'; {_hint(bare[1], names)}"


def _missed_by(module: str) -> str | None:
    """What a module misses that cannot be imported: a package that it imports, or itself."""
    try:
        if module and may_import(module):
            import_module(module)
    except ImportError as error:
        return missing_package(error)
    return None


def _missing(message: str, classes: list[str]) -> str | None:
    """The sentence for settings of a class that have no default and were not given."""
    required = re.search(r"following arguments are required: ([\w., ]+)", message)
    if required is None or not classes:
        return None
    return f"{classes[-1]} needs {required[1].strip()}; give a value, below init_args in a file."


def _not_allowed(message: str, classes: list[str]) -> str | None:
    """The sentence for a value that is not among those allowed, or of another kind."""
    choices = [
        part.strip().strip("'\"")
        for each in re.findall(r"typing.Literal\[([^\]]+)\]", message)
        for part in each.split(",")
    ]
    kinds = [
        _KINDS[kind] for kind in re.findall(r"Expected an? <class '(?:[\w.]+\.)?(\w+)'>", message) if kind in _KINDS
    ]
    value = re.search(r"Got value: ?(.*)$|Given value: (.{1,80})$", message, flags=re.MULTILINE)
    if value is None or not (choices or kinds):
        return None
    allowed = list(dict.fromkeys(choices))
    if any(choice.isdigit() for choice in allowed):  # numbers are among the choices
        kinds = [kind for kind in kinds if kind != _KINDS["int"]]
    words = f"one of {', '.join(allowed)}" if len(allowed) > 1 else "".join(allowed)
    told = " or ".join(dict.fromkeys(part for part in (words, *kinds) if part))
    owner = f"{classes[-1]}: " if classes else ""
    given = next((group for group in value.groups() if group), "")
    near = did_you_mean(nearest(given, allowed))
    return f"{owner}{_key_in(message)} is {given!r}, but must be {told}{f'; {near}' if near else '.'}"


def _key_in(message: str) -> str:
    """The innermost setting that a report speaks of, by its dotted name where one is told."""
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    keys = re.findall(r"Parser key \"([^\"]+)\"", message)
    inner: str = keys[-1] if keys else ""
    return nested[1] if nested and nested[1].startswith(f"{inner}.") else inner


def _classes_of(module: str) -> list[str]:
    """Names of the public classes of a module."""
    found = load_path(module)
    return [name for name in getattr(found, "__all__", dir(found)) if isinstance(getattr(found, name, None), type)]


def _group_as_value(message: str, classes: list[str]) -> str | None:
    """The sentence for a group of settings that was given one value, such as ``gate: token``; None for other reports.

    A parser takes such a value for the name of a file to read the group from.
    """
    found = re.search(r"Parser key \"([\w.]+)\":\s+Unable to load config '([^']*)'", message)
    if found is None or not classes:
        return None
    name, value = found.groups()
    inside = [key.partition(".")[2] for key in _settings_of(load_path(classes[-1])) if key.startswith(f"{name}.")]
    return f"{classes[-1]}: {name} is '{value}', but is a group of settings: {', '.join(inside)}." if inside else None


def _hint(name: str, known: Iterable[str]) -> str:
    """What was probably meant: by a name of old, by the last part of a dotted name, or by all of it."""
    names = sorted(set(known))
    leaves: dict[str, list[str]] = {}
    for key in names:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    leaf = name.rpartition(".")[2]
    near = (
        leaves.get(leaf) or _renamed(leaf, leaves) or [key for close in nearest(leaf, leaves) for key in leaves[close]]
    )
    if hint := did_you_mean(near[:2] or nearest(name, names)):
        return hint
    return f"known are {', '.join(names)}." if 0 < len(names) <= 40 else "see --help for what is allowed."


def _renamed(leaf: str, leaves: Mapping[str, list[str]]) -> list[str]:
    """What a setting of an earlier name is now; where several groups have that name, the one that it belonged to."""
    found = leaves.get(EARLIER.get(leaf, ""), [])
    own = [key for key in found if key.startswith(leaf.split("_")[0])]
    return own or found


def _settings_of(target: Any) -> list[str]:
    """Settings of a class as they are written below it, those of groups as ``optimizer.lr``."""
    parameters = {} if target is None else signature(target).parameters
    catch_all = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    found = [key for key, value in parameters.items() if value.kind not in catch_all]
    for group, value in parameters.items():
        if is_dataclass(value.default):
            found += [f"{group}.{field.name}" for field in fields(value.default)]
    return found
