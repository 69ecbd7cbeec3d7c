"""Whose code may run: a run folder from elsewhere names classes, and shards that are commands; most are refused.

What the user grants comes from the command line alone (``--trust MODULE``, ``--allow_pipe true``), never from a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from visexpert.errors import ConfigError

HELP = """
options of all commands:
  --trust MODULE       let a run's config.yaml name classes of this module of yours, too (repeatable); without it only
                       visexpert's own and Lightning's may be named
  --allow_pipe true    let shards called `pipe:COMMAND` run their commands
"""

PIPE = "VISEXPERT_ALLOW_PIPE"
"""Variable of the environment that tells workers of any kind; set and cleared by :func:`grant`."""

OURS = ("visexpert",)
NOT_OURS = ("app", "cli", "commands", "demo", "integrations", "planning", "runs", "training")
"""Parts of the package that carry out commands; no configuration has them built."""

LIGHTNING = tuple(
    f"{name}.{part}"
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
)
"""What a trainer is made of; they write files, and run no code that a configuration brings."""


MOST_YAML = 1_000_000
"""Size in bytes from which on a file that a configuration names is no configuration."""


@dataclass(frozen=True)
class Granted:
    """What the user allows.

    Args:
        modules: Modules of the user whose classes a run may name.
        pipe: Whether shards may be commands.
    """

    modules: tuple[str, ...] = ()
    pipe: bool = False


_granted = Granted()

_POLICY = ("import_path_verdicts", "import_paths_enforced")
"""Settings of the parser that say what may be imported because a value names it."""


def take(arguments: Iterable[str]) -> tuple[list[str], Granted]:
    """Take ``--trust`` and ``--allow_pipe`` out of a command line.

    Raises:
        ConfigError: One has no value, or one that cannot be.
    """
    left: list[str] = []
    values: dict[str, list[str]] = {"--trust": [], "--allow_pipe": []}
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name not in values:
            left.append(argument)
            continue
        value = value if equals else next(given, "")
        if not value or value.startswith("-"):
            raise ConfigError(f"{name} needs a value: {'a module' if name == '--trust' else 'true or false'}.")
        values[name].append(value)
    pipe = [value.lower() for value in values["--allow_pipe"]]
    if wrong := [value for value in pipe if value not in ("true", "false")]:
        raise ConfigError(f"--allow_pipe is {wrong[0]!r}, but must be true or false.")
    return left, Granted(tuple(values["--trust"]), pipe[-1:] == ["true"])


def grant(granted: Granted) -> None:
    """Allow this from now on, in this process and in those that it starts; what was allowed before is not."""
    global _granted
    _granted = granted
    if granted.pipe:
        os.environ[PIPE] = "1"
    else:
        os.environ.pop(PIPE, None)


def require_pipe(shard: str) -> None:
    """Check that shards may be commands.

    Raises:
        ConfigError: Nobody has allowed it.
    """
    if not pipe_allowed():
        raise ConfigError(
            f"The shard {shard!r} would run a command; if you trust it, add --allow_pipe true to the command line (in "
            "Python: visexpert.trust.grant(visexpert.trust.Granted(pipe=True))); a configuration cannot."
        )


def pipe_allowed() -> bool:
    """Whether shards may be commands."""
    return os.environ.get(PIPE) == "1"


def refuse_strangers(config: Any, path: Path, *, trust: Iterable[str] = ()) -> None:
    """Refuse a configuration that names classes or functions that are not known to be harmless.

    Args:
        config: What was read, or what a parser made of it: mappings and sequences with ``class_path`` anywhere.
        path: Its file, for the message.
        trust: Modules that may be named beside those of the command line.

    Raises:
        ConfigError: It does; nothing of it was imported, but for what is visexpert's, Lightning's or trusted.
    """
    trusted = (*_granted.modules, *trust)
    for named in _named(config, path.parent):
        if not (_is_known(named, trusted) if isinstance(named, str) else _is_harmless(named, trusted)):
            name = named if isinstance(named, str) else f"{named.__module__}.{named.__qualname__}"
            raise _refusal(path, name)


class UntrustedError(ConfigError):
    """A stranger's configuration names what could run any code."""


def _refusal(path: Path, name: str) -> UntrustedError:
    return UntrustedError(
        f"{path} names {name!r}, which is no class of visexpert or Lightning and could run anything; if you trust it, "
        f"add  --trust {(module := name.rpartition('.')[0] or name)}  (in Python: load_run(..., trust=[{module!r}]))."
    )


@contextmanager
def guarded(path: Path | None, *, trust: Iterable[str] = ()) -> Iterator[None]:
    """Let parsers import nothing in here that a stranger's configuration names and :func:`refuse_strangers` refuses.

    To import a module runs it, and a class can be named in more ways than by ``class_path``: as plain text, by an
    interpolation, in a file that a file names.

    Args:
        path: The configuration; None where it is the user's own, which changes nothing.
        trust: See :func:`refuse_strangers`.

    Raises:
        UntrustedError: It names such a class.
    """
    if path is None:
        yield
        return
    from jsonargparse import set_parsing_settings  # here, so that --help does not wait for it
    from jsonargparse._common import get_parsing_setting, parsing_settings

    before = {name: get_parsing_setting(name) for name in _POLICY}
    set_parsing_settings(
        import_path_denylist=["*", *(f"{OURS[0]}.{part}" for part in NOT_OURS)],
        import_path_allowlist=[*OURS, *LIGHTNING, *filter(_is_module, (*_granted.modules, *trust))],
    )
    try:
        yield
    except Exception as error:
        denied = _denied(error)
        if denied is None:
            raise
        raise _refusal(path, denied) from error
    finally:
        parsing_settings.update(before)


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split(".")) and not _inside(name, ("jsonargparse",))


def may_import(class_path: str) -> bool:
    """Whether nothing forbids at present to import what a value names."""
    from jsonargparse._common import denying_import_path_entry, get_parsing_setting

    return not get_parsing_setting("import_paths_enforced") or denying_import_path_entry(class_path) is None


def _denied(error: BaseException | None) -> str | None:
    """What a parser was not allowed to import, by the report of the error or of what it came from."""
    while error is not None:
        found = re.search(r"Importing '([^']+)' is not allowed", str(error))
        if found is not None:
            return found[1]
        error = error.__cause__ or error.__context__
    return None


def _named(config: Any, folder: Path) -> Iterator[Any]:
    """Every class path, also in files that are named, and every class or function that a parser has looked up."""
    if isinstance(config, Mapping) or (hasattr(config, "items") and not isinstance(config, type)):
        for key, value in config.items():
            if str(key).rpartition(".")[2] == "class_path":
                yield str(value)
            else:
                yield from _named(value, folder)
    elif isinstance(config, list | tuple | set):
        for value in config:
            yield from _named(value, folder)
    elif isinstance(config, str):
        yield from _named(_content(config, folder), folder)
    elif callable(config) and hasattr(config, "__qualname__") and hasattr(config, "__module__"):
        yield config


def _content(value: str, folder: Path) -> Any:
    """What a parser would put in place of the name of a YAML file; None of anything else."""
    import yaml

    for path in (folder / value, Path(value)):
        try:
            if path.is_file() and path.stat().st_size <= MOST_YAML:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
                return found if isinstance(found, dict | list) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
            continue  # a parser cannot read it either
    return None


def _is_known(class_path: str, trusted: tuple[str, ...]) -> bool:
    """Whether a path leads to what is harmless; others are not imported to find out."""
    if "." not in class_path:  # a parser finds a bare name among classes that are imported; it is looked at then
        return True
    if not _inside(class_path, (*OURS, *LIGHTNING, *trusted)):
        return False
    found = _find(class_path.split("."))
    return found is None or _is_harmless(found, trusted)  # what is nowhere ends in the parser's own sentence


def _find(parts: list[str]) -> Any:
    """What a dotted path leads to, however many of its last names are attributes; None where it leads nowhere."""
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            found = getattr(found, name, None)
        return found
    return None


def _is_harmless(found: Any, trusted: tuple[str, ...]) -> bool:
    """A class of visexpert or Lightning, or whatever a trusted module defines; not what they merely import."""
    home = str(getattr(found, "__module__", ""))
    if _inside(home, trusted):
        return True
    if not isinstance(found, type) or not _inside(home, (*OURS, *LIGHTNING)):
        return False
    return not _inside(home, tuple(f"{OURS[0]}.{part}" for part in NOT_OURS))


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
