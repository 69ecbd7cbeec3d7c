"""Weights in fewer bits: what is stored, and the model that an export is then compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.export.source import ExportSource

Dtype = Literal["float32", "bfloat16", "float16"]

ROUNDED = ("hf", "open_clip", "llava")
"""Formats that store weights in another dtype."""


def check_dtype(formats: Iterable[str], dtype: Dtype | None) -> None:
    """Refuse a dtype for a format that has none.

    Raises:
        ConfigError: It is given beside one.
    """
    for name in formats:
        if dtype is not None and name not in ROUNDED:
            raise ConfigError(
                f"--dtype {dtype}: --format {name} holds float32 weights alone; leave --dtype out, or take one of "
                f"{', '.join(ROUNDED)}."
            )


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as an export stores it, contiguous; None leaves it as it is.

    Raises:
        ConfigError: It is beyond the range of the dtype.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise ConfigError(
            f"A weight of {float(tensor.abs().max()):.3g} is beyond the range of {name_of(dtype)}; take --dtype "
            "bfloat16."
        )
    return rounded.contiguous()


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def computing_in_float32(source: ExportSource, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the run's model compute in float32, from the weights as they are or rounded to ``dtype``.

    Low-rank updates are part of what is rounded: the merged language model takes its place then.
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
    """The dtypes that an export holds, in words."""
    kept = source.dtype or torch.float32
    language = kept if source.language is None or source.dtype else source.language.model.dtype
    if language == kept:
        return name_of(kept)
    return (
        f"{name_of(language)} of the language model, as in the run, else {name_of(kept)}; transformers loads all in "
        f"{name_of(kept)} unless told another dtype"
    )
