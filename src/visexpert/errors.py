"""Errors that are the user's to mend: one clear sentence each (what, where, what is allowed, what next).

The command line prints them without a traceback; everything else that is raised is a defect of ours, apart from what
:func:`told_by_machine` knows: full disks, missing rights, memory that ran out.
"""

from __future__ import annotations

import errno
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path


class UserError(Exception):
    """Base of the errors below; the command line ends with its message and exit code 2."""


class ConfigError(UserError):
    """A setting that cannot work: unknown name, impossible size, contradicting options."""


class DataError(UserError):
    """Images, annotations or a cache that cannot be read or written."""


class WeightsError(UserError):
    """Weights that are missing, of the wrong shape, or in a format that may run code."""


def user_error_in(error: BaseException) -> BaseException:
    """The user's error inside a library's own, where there is one; else the error itself."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), error)


def causes(error: BaseException, *, named: bool = False) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; with ``named`` not what was merely being handled at the time."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if named else cause.__context__)


def shown(text: object) -> str:
    r"""Text for a terminal: what cannot be printed (``\x1b``, ``\n``, half a surrogate pair) becomes its escape.

    Names of files, and what others wrote into them, may hold sequences that recolor, rewrite or retitle a terminal.
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in str(text))


def nearest(name: str, known: Iterable[str], *, most: int = 2) -> list[str]:
    """Return what a name was probably meant to be: those that it abbreviates, else those that are spelled alike."""
    names = list(known)
    begun = [each for each in names if name.strip("-") and each.startswith(name)]
    return (begun or get_close_matches(name, names, n=most, cutoff=0.6))[:most]


def did_you_mean(near: Iterable[str]) -> str:
    """Return the question that names what was probably meant; empty where there is nothing."""
    names = " or ".join(map(repr, near))
    return f"did you mean {names}?" if names else ""


def require_checkout(owner: str, *paths: str) -> None:
    """Check that what is written into the source of this package finds it there, before anything trains.

    Raises:
        ConfigError: A path leads into ``src/visexpert``, and the working directory holds no checkout.
    """
    for path in paths:
        if Path(path).parts[:2] == ("src", "visexpert") and not Path("src", "visexpert").is_dir():
            raise ConfigError(
                f"{owner} writes to '{path}', but '{Path.cwd()}' is no checkout of visexpert; go to one, or name "
                "another folder in the callback's settings."
            )


def next_step(*commands: Iterable[object]) -> str:
    """Return the last line of a command: what can be typed next.

    Args:
        commands: Each the words after ``visexpert``; those that are no plain text are quoted for a shell.
    """
    told = [" ".join(("visexpert", *(shlex.quote(shown(word)) for word in words))) for words in commands]
    return f"Next: {', or '.join(told)}"


def require_numbers(
    owner: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **numbers: float | None,
) -> None:
    """Check that settings are finite numbers inside a range.

    Args:
        owner: Whose settings, for the message.
        least: Smallest value.
        above: What each must exceed.
        most: Largest value.
        below: What none may reach.
        numbers: Settings by name; None is one that was left open.

    Raises:
        ConfigError: One is not, NaN included.
    """
    ranges = {"at least": least, "above": above, "at most": most, "below": below}
    allowed = " and ".join(f"{words} {bound:g}" for words, bound in ranges.items() if bound is not None)
    for name, value in numbers.items():
        fits = value is None or (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not fits:
            raise ConfigError(f"{owner}: {name} is {value}, but must be a number {allowed}".rstrip() + ".")


def missing_package(error: BaseException) -> str | None:
    """Return what an import missed and what to do, as the end of a sentence, or None for other errors.

    Args:
        error: An ``ImportError``, lightning's report of a requirement, or whatever was raised from one.
    """
    for cause in causes(error):
        if found := re.search(r"Requirement '([^']+)' not met", str(cause)):
            return f"needs {found[1]}, which is not installed: pip install '{found[1]}'."
        if found := re.search(r"(?:No module named|Module not found:) '?([\w.]+)", str(cause)):
            module = found[1].partition(".")[0]  # packages are not always called like their modules
            if find_spec(module) is None:  # else a module of a package that is there
                return f"needs the module {module}, which is not installed; install its package, or correct the name."
    return None


def require_package(package: str, *, extra: str, what: str) -> None:
    """Check that a package is installed that only an extra of visexpert asks for.

    Args:
        package: Its name, as it is imported.
        extra: The extra.
        what: What needs it.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install 'visexpert[{extra}]'.")


def require_channels(owner: str, *, mean: object, std: object) -> None:
    """Check what images are normalized with: three finite numbers each, and no standard deviation of 0 or less.

    Args:
        owner: Whose settings, for the message.
        mean: Channel means.
        std: Channel standard deviations.

    Raises:
        ConfigError: They are something else.
    """
    for name, values, allowed in (("mean", mean, "three numbers"), ("std", std, "three numbers above 0")):
        numbers = list(values) if isinstance(values, list | tuple) else []
        real = all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
        if len(numbers) != 3 or not real or (name == "std" and min(numbers) <= 0):
            raise ConfigError(
                f"{owner}: images are normalized with {name}={values!r}, which must be {allowed}; correct it in the "
                "model's own file (preprocessor_config.json, open_clip_config.json)."
            )


def told_by_machine(error: BaseException) -> UserError | None:
    """One sentence for what is neither a setting nor a defect: disk, rights, memory, a process that was killed.

    Args:
        error: What ended a command.

    Returns:
        What to tell instead, or None where ``error`` is of another kind.
    """
    for cause in causes(error, named=True):
        if isinstance(cause, UserError):
            return cause
        names = {kind.__name__ for kind in type(cause).__mro__}
        text = first_line(cause)
        if names & {"MemoryError", "OutOfMemoryError"} or "not enough memory" in text or "out of memory" in text:
            return DataError(
                f"The memory does not suffice ({text or 'MemoryError'}); lower batch_size and raise "
                "trainer.accumulate_grad_batches by as much, or lower num_workers."
            )
        if found := re.match(r"DataLoader timed out after ([\d.]+) seconds", text):
            return DataError(
                f"The workers that read data have given nothing for {found[1]} s: the disk or network may hang; see "
                "whether the files can be read, raise worker_timeout (0 waits without end), or set num_workers to 0."
            )
        if "DataLoader worker" in text:
            return DataError(
                f"A worker that reads data has died ({text}), mostly because memory ran out; lower num_workers "
                "or batch_size."
            )
        if "DistError" in names or "gloo/transport" in text:
            reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", text)
            return UserError(
                f"Another process of this run has died, hangs or cannot be reached ({reason}); see what it printed "
                "itself, and run the command again: a fit goes on with --ckpt_path last."
            )
        if isinstance(cause, OSError) or names & {"SafetensorError"} or "PytorchStreamWriter" in text:
            return _of_system(cause, text)
        if "MisconfigurationException" in names:  # Lightning's name for a user's error
            return ConfigError(f"{text.rstrip('.')}; change that setting of the trainer.")
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that libraries add to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = len(lines) > 1 and lines[0].endswith(":")
    return " ".join(lines[: 1 + more])[:300]


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


def _of_system(error: BaseException, text: str) -> DataError:
    """A sentence about a file that cannot be read or written."""
    number = error.errno if isinstance(error, OSError) else None
    name = error.filename if isinstance(error, OSError) else None
    what = text if name is None or error.strerror is None else f"{error.strerror}: {name}"  # type: ignore[attr-defined]
    if number in _NO_ROOM or "No space left" in text or "PytorchStreamWriter" in text:
        return DataError(f"The disk is full ({what}); free some space and run the command again.")
    if number in _NO_RIGHTS:
        return DataError(f"The system does not allow it ({what}); change the rights, or name another place.")
    return DataError(f"A file cannot be read or written ({what or type(error).__name__}); check its path and disk.")
