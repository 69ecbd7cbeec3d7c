"""Arguments of public classes and functions held against their annotations, for callers whom no parser checks."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, wraps
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from visexpert.errors import ConfigError

T = TypeVar("T")
MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
ALL = CollectionCheckStrategy.ALL_ITEMS


def typed(target: T) -> T:
    """Decorate a public class or function: refuse arguments that are not what its annotations say.

    A path becomes the text that names it, a list a tuple or the reverse, and a number of numpy's a number, where that
    is what fits. Not for what runs in every training step, since it takes time. Arguments that are missing or too many
    stay Python's ``TypeError``.

    Raises:
        ConfigError: When called with something else; the message names the argument and what it takes.
    """
    if isinstance(target, type):
        if not is_typed(target):  # by the class that it has its constructor from
            setattr(target, "__init__", _checked(target.__init__, of_class=True))  # type: ignore[misc]  # noqa: B010
        return target
    return _checked(target, of_class=False)  # type: ignore[arg-type, return-value]


def is_typed(target: object) -> bool:
    """Return whether :func:`typed` decorates a function, or the constructor that a class has or inherits."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    return getattr(function, "checks_arguments", False)


def _checked(function: Callable[..., Any], *, of_class: bool) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing
        owner = type(args[0]).__name__ if of_class else function.__qualname__.rpartition("<locals>.")[2]
        hints = _hints(function)
        for name in hints.keys() & bound.arguments.keys():
            bound.arguments[name] = _fitting(bound.arguments[name], hints[name], f"{owner}: {name}")
        return function(*bound.args, **bound.kwargs)

    call.checks_arguments = True  # type: ignore[attr-defined]
    return call


@cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations of single arguments that exist at run time."""
    inner = inspect.unwrap(function)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(inner).parameters.items():
        holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
        if parameter.annotation is not parameter.empty and parameter.kind not in MANY:
            with suppress(NameError):  # of a name for type checkers alone, or of a function's inside
                found |= typing.get_type_hints(holder, globalns=inner.__globals__)
    return found


def _fitting(value: Any, hint: Any, what: str) -> Any:
    """Return a value, or what it stands for, if it fits a hint."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    inside = None
    for reading in _readings(value):
        for part in parts:
            if _only_seems_to_take(part, reading):
                continue
            try:
                return check_type(reading, part, collection_check_strategy=ALL)
            except TypeCheckError as error:
                inside = inside or re.match(r"(?:item|key|value of) .*?(?=:?$)", str(error), re.M)
    where = f": {inside[0]}" if inside else ""
    words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if isinstance(value, str) and words:
        raise ConfigError(f"{what}={value!r} is unknown; use one of {', '.join(words)}.")
    given = f"{value!r:.60}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
    takes = re.sub(r"(?:\w+\.)+(?=\w)", "", " or ".join(map(inspect.formatannotation, parts)))
    raise ConfigError(f"{what} is {given}{where}; it must be {takes}.")


def _only_seems_to_take(part: Any, value: Any) -> bool:
    """Whether Python counts a value in, but nobody means it: a text as a list of its letters, a truth as a number."""
    kind = get_origin(part) or part
    if isinstance(value, str):
        return isinstance(kind, type) and kind is not str and issubclass(kind, Iterable)
    return isinstance(value, bool) and part in (int, float)


def _readings(value: Any) -> list[Any]:
    other: Mapping[type, Callable[[Any], Any]] = {PurePath: str, list: tuple, tuple: list, np.generic: np.generic.item}
    return [value, *(convert(value) for kind, convert in other.items() if isinstance(value, kind))]
