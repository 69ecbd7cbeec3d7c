"""Parts whose weights are read when they are first used, if nothing has put weights in before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


class ReadsWeights(nn.Module):
    """A part that is built with random weights and filled by ``load_weights``, at the latest by its first call.

    A hook on the first call does that, and is gone once the weights are in place: later calls cost nothing more.

    Weights count as in place once ``load_weights`` has run or state dicts that hold all of the part were loaded. What a
    state lacks is read from the source at the first call, and what the state held is kept.
    Nothing is read for a call on the ``meta`` device.
    """

    weights_in_place = False
    """Whether weights were read or loaded; a part without a source is in place after its first call."""
    _filled: frozenset[str] = frozenset()
    """Keys that state dicts have put in before the rest was read."""

    def __init__(self) -> None:
        super().__init__()
        self._first_use = self.register_forward_pre_hook(_read_before_call, with_kwargs=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("load_weights")
        if own is not None and not getattr(own, "__isabstractmethod__", False):
            setattr(cls, "load_weights", _noted(own))  # noqa: B010
        if "fingerprint" in cls.__dict__:  # one of random weights would name tokens that nobody has
            setattr(cls, "fingerprint", _read_before(cls.__dict__["fingerprint"]))  # noqa: B010

    def load_weights(self) -> None:
        """Fill the network with its pretrained weights; see the class."""

    def mark_weights_in_place(self) -> None:
        """Say that something else has put the weights in, so that the first call reads none."""
        self.weights_in_place = True
        self._first_use.remove()

    def read_on_first_use(self, device: torch.device) -> None:
        """Read the weights now, where nothing has put them in.

        Args:
            device: Where the call computes; the part is moved there if it was read anew.

        Raises:
            WeightsError: They are nowhere, or do not fit.
        """
        if self.weights_in_place or device.type == "meta":
            return
        before = [parameter.device for parameter in self.parameters()]
        held = {name: tensor.detach().clone() for name, tensor in self._tensors().items() if name in self._filled}
        self.load_weights()
        self.mark_weights_in_place()
        for name, tensor in self._tensors().items() if held else ():
            if name in held:
                tensor.data.copy_(held[name])
        if [parameter.device for parameter in self.parameters()] != before:  # built anew: large models are
            self.to(device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.weights_in_place:
            return
        # A checkpoint leaves frozen parts out, and may hold a LoRA without its base, as state_dict() itself then does.
        own = {name for name, _ in self.named_parameters()}
        self._filled |= {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if own and own <= self._filled:
            self.mark_weights_in_place()

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


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
        self.mark_weights_in_place()

    return load_weights


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _read_before_call(part: ReadsWeights, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    part.read_on_first_use(_device_of((*args, *kwargs.values(), *part.parameters(), *part.buffers())))


def _read_before(ask: Callable[..., str]) -> Callable[..., str]:
    @wraps(ask)
    def fingerprint(self: ReadsWeights) -> str:
        self.read_on_first_use(_device_of((*self.parameters(), *self.buffers())))
        return ask(self)

    return fingerprint


def _device_of(values: Iterable[Any]) -> torch.device:
    """Device of the first tensor, or of the vision tokens that a language model reads."""
    tensors = (value if isinstance(value, Tensor) else getattr(value, "tokens_BTD", None) for value in values)
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))
