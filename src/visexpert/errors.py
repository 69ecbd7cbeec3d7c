"""Errors that are the user's to mend: one clear sentence each (what, where, what is allowed, what next).

The command line prints them without a traceback; everything else that is raised is a defect of ours.
"""

from __future__ import annotations


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
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause
