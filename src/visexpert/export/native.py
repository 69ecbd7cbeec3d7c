"""The format of the library that an encoder is from, and which formats an encoder can be written in."""

from __future__ import annotations

from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.export.rounding import stored_weights
from visexpert.export.source import ExportSource
from visexpert.vision import VisionEncoder


def write_native(source: ExportSource, folder: Path) -> None:
    """Write what the encoder's own library writes, with the weights as they are to be stored.

    Raises:
        ConfigError: The encoder has no such format.
        WeightsError: Its source, whose other parts are copied, is gone.
    """
    source.clip.save(folder, stored_weights(source))


def default_format(clip: VisionEncoder) -> str:
    """Return the format to write an encoder in where none was asked for."""
    return _written_in(clip)[0]


def check_encoder(clip: VisionEncoder, name: str) -> None:
    """Check that an encoder can be written in a format.

    Raises:
        ConfigError: It cannot; the message names the formats to take.
    """
    reason = clip.formats().get(name)
    if reason is not None:
        *others, last = _written_in(clip)
        raise ConfigError(f"The format {name} {reason}; use {', '.join(others)} or {last}.")


def _written_in(clip: VisionEncoder) -> list[str]:
    return [name for name, reason in clip.formats().items() if reason is None]
