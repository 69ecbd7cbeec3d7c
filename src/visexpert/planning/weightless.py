"""Models without weights: their parameters on the ``meta`` device, their code and their buffers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def weightless() -> Iterator[None]:
    """Whatever is built inside has its parameters on ``meta``: shapes and dtypes without memory or initialization.

    Buffers stay real, since code reads their values (which experts are attached, say). Tied weights stay tied.
    """
    handle = register_module_parameter_registration_hook(_empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
