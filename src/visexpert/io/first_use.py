"""Parts whose weights are read when they are first used, if nothing has put weights in before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


class ReadsWeights(nn.Module):
    """A part that is built with random weights and filled by ``load_weights``, at the latest by its first call.

    Weights count as in place once ``load_weights`` has run or a state dict that holds some of the part was loaded.
    Nothing is read for a call on the ``meta`` device.
    """

    _in_place = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("load_weights")
        if own is not None and not getattr(own, "__isabstractmethod__", False):
            setattr(cls, "load_weights", _noted(own))  # noqa: B010
        if "fingerprint" in cls.__dict__:  # one of random weights would name tokens that nobody has
            setattr(cls, "fingerprint", _read_before(cls.__dict__["fingerprint"]))  # noqa: B010

    def load_weights(self) -> None:
        """Fill the network with its pretrained weights; see the class."""

    @property
    def weights_in_place(self) -> bool:
        """Whether weights were read or loaded; a part without a source is in place after its first call."""
        return self._in_place

    def mark_weights_in_place(self) -> None:
        """Say that something else has put the weights in, so that the first call reads none."""
        self._in_place = True

    def read_on_first_use(self, device: torch.device) -> None:
        """Read the weights now, where nothing has put them in.

        Args:
            device: Where the call computes; the part is moved there if it was read anew.

        Raises:
            WeightsError: They are nowhere, or do not fit.
        """
        if self._in_place or device.type == "meta":
            return
        before = [parameter.device for parameter in self.parameters()]
        self.load_weights()
        self._in_place = True
        if [parameter.device for parameter in self.parameters()] != before:  # built anew: large models are
            self.to(device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_place and (device := _device_of(args)) is not None:
            self.read_on_first_use(device)
        return super().__call__(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(key.startswith(prefix) for key in state_dict):  # a checkpoint leaves frozen parts out
            self._in_place = True


def described(part: nn.Module, source: object, facts: Sequence[str]) -> str:
    """Return one line about a part: class, source, facts, number of parameters, whether its weights are to be read."""
    number = sum(parameter.numel() for parameter in part.parameters())
    unit, scale = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= s), ("", 1))
    waits = source is not None and isinstance(part, ReadsWeights) and not part.weights_in_place
    said = [str(source) if source is not None else "random", *facts, f"{number / scale:.3g}{unit} parameters"]
    return f"{type(part).__name__}({', '.join(said)}{', weights not read yet' if waits else ''})"


def _noted(load: Callable[..., None]) -> Callable[..., None]:
    @wraps(load)
    def load_weights(self: ReadsWeights) -> None:
        load(self)
        self._in_place = True

    return load_weights


def _read_before(ask: Callable[..., str]) -> Callable[..., str]:
    @wraps(ask)
    def fingerprint(self: ReadsWeights) -> str:
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        self.read_on_first_use(device)
        return ask(self)

    return fingerprint


def _device_of(args: tuple[Any, ...]) -> torch.device | None:
    """Device of the first tensor, or of the vision tokens that a language model reads."""
    for value in args:
        tensor = value if isinstance(value, Tensor) else getattr(value, "tokens_BTD", None)
        if isinstance(tensor, Tensor):
            return tensor.device
    return None
