"""Weights in fewer bits: what an export stores, and the model that it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.export.source import ExportSource

Dtype = Literal["float32", "bfloat16", "float16"]

ROUNDED = ("native", "hf", "open_clip", "llava")
"""Formats that can store weights in another dtype."""


def check_dtype(formats: Iterable[str], dtype: Dtype | None) -> None:
    """Check that formats can store a dtype.

    Raises:
        ConfigError: A format stores float32 only.
    """
    for name in formats:
        if dtype is not None and name not in ROUNDED:
            raise ConfigError(
                f"The format {name} stores float32 weights only; leave out dtype {dtype}, or use one of "
                f"{', '.join(ROUNDED)}."
            )


def stored_weights(source: ExportSource) -> dict[str, Tensor]:
    """Return the encoder's weights as an export stores them, under its network's own keys."""
    return {key: stored(value, source.dtype) for key, value in source.clip.model.state_dict().items()}


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a weight as an export stores it, contiguous; None keeps its dtype.

    Raises:
        ConfigError: The weight is outside the range of the dtype.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise ConfigError(
            f"A weight of {float(tensor.abs().max()):.3g} is outside the range of {name_of(dtype)}; use the dtype "
            "bfloat16."
        )
    return rounded.contiguous()


def name_of(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def computing_in_float32(source: ExportSource, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute in float32, with the run's weights as they are or rounded to ``dtype``.

    Low-rank updates are rounded, too: the merged language model replaces the run's.
    """
    parts: Any = source.language
    modules: list[nn.Module] = [source.clip.model]
    own: Any = None
    if parts is not None:
        own = parts.side.model
        if dtype is not None:
            parts.side.model = parts.model
        modules += [parts.side, parts.linear_1, parts.linear_2]
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    before = {key: parameter.data for key, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            if parameter.is_floating_point():
                parameter.data = stored(parameter.data, dtype).float()
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.data = before[key]
        if parts is not None:
            parts.side.model = own


def weights_told(source: ExportSource) -> str:
    """Describe the dtypes of an export."""
    kept = source.dtype or torch.float32
    language = kept if source.language is None or source.dtype else source.language.model.dtype
    if language == kept:
        return name_of(kept)
    return (
        f"{name_of(language)} for the language model, as in the run, else {name_of(kept)}; transformers loads all in "
        f"{name_of(kept)} unless given another dtype"
    )
