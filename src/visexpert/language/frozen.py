"""Frozen weights: left out of checkpoints, and not missing when one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def leave_out_of_checkpoints(module: nn.Module, names: Callable[[], Collection[str]]) -> None:
    """Keep some of a module's weights out of its state dict, even if it is part of a larger module.

    Args:
        module: The module; these weights must be filled before a checkpoint is loaded.
        names: Returns their names in the module's own state dict.
    """
    seen: dict[str, str] = {}

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in names():
            state.pop(prefix + name, None)

    def note(_: nn.Module, __: Any, prefix: str, *___: Any) -> None:
        seen["prefix"] = prefix

    def forgive(_: nn.Module, incompatible: Any) -> None:
        absent = {seen["prefix"] + name for name in names()}
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in absent]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(note)
    module.register_load_state_dict_post_hook(forgive)
