"""The model library's own forward, watched module by module: where does it compute what we hand on?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.commands.trial.attempt import Comparison

VISION_PARTS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")
"""Where models with more than an encoder keep it; of LLaVA's kind inside ``model``."""

MOST_EXTRA = 64
"""Tokens before and behind the grid that are looked past: class tokens, registers, detection tokens."""


FORWARD = "its output"


class Watch:
    """Finds the output of a library's module that equals given tokens.

    Args:
        tokens_BSE: What we hand on.
        library: Its name, for the result.
    """

    def __init__(self, tokens_BSE: Tensor, library: str) -> None:
        self.tokens_BSE = tokens_BSE
        self.library = library
        self.best: Comparison | None = None
        self._depth = 0

    def run(self, network: nn.Module, call: Callable[[], Any]) -> Comparison | None:
        """Run the library and give the nearest output; None where none has such a shape."""
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in network.named_modules()]
        try:
            with torch.no_grad():
                self.look(FORWARD, call())
        finally:
            for hook in hooks:
                hook.remove()
        return self.best

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.look(name or FORWARD, output)

        return hook

    def look(self, name: str, output: Any) -> None:
        """Compare each tensor of a module's output with the tokens, wherever they may stand in it."""
        for place, tensor in tensors_in(output):
            where = f"{self.library}: {name}{place}"
            depth = 0 if name == FORWARD else 1 + name.count(".")
            for part, rows_BSE in self._candidates(tensor):
                self._take(Comparison.of("tokens", where + part, self.tokens_BSE, rows_BSE), depth)

    def _take(self, found: Comparison, depth: int) -> None:
        """Keep the nearest; of equal ones the outermost, and the last of those."""
        best = self.best
        if best is None or (found.equal and (not best.equal or depth <= self._depth)):
            self.best, self._depth = found, depth
        elif not best.equal and found.difference < best.difference:
            self.best, self._depth = found, depth

    def _candidates(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        batch, count, width = self.tokens_BSE.shape
        if tensor.shape[0] != batch or not tensor.is_floating_point():
            return
        if tensor.ndim == 4:
            if tensor.shape[1] == width and tensor.shape[2] * tensor.shape[3] == count:
                yield "", tensor.flatten(2).transpose(1, 2)
            if tensor.shape[3] == width and tensor.shape[1] * tensor.shape[2] == count:
                yield "", tensor.flatten(1, 2)
        elif tensor.ndim == 3 and tensor.shape[2] == width:
            extra = tensor.shape[1] - count
            for first in range(min(extra, MOST_EXTRA) + 1):
                part = f", tokens {first} to {first + count - 1} of {tensor.shape[1]}" if extra else ""
                yield part, tensor[:, first : first + count]


def tensors_in(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in what a module gives, with their names in it."""
    if isinstance(output, Tensor):
        if output.ndim:
            yield "", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            for place, tensor in tensors_in(value):
                yield f", {key}{place}", tensor
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)


def vision_part(model: nn.Module) -> nn.Module:
    """The encoder of images in a model that has more."""
    for holder in (model, getattr(model, "model", None)):
        for name in VISION_PARTS:
            part = getattr(holder, name, None)
            if isinstance(part, nn.Module):
                return part
    return model
