"""Compare an encoder's tokens with those of its own library, computed from the same normalized pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.commands.trial.attempt import Comparison
from visexpert.experts import (
    DepthExpert,
    OpenClipExpert,
    SegmentationExpert,
    TimmExpert,
    VisionExpert,
)
from visexpert.experts.transformers import AutoModelExpert
from visexpert.io.source import ModelSource
from visexpert.networks import RANDOM
from visexpert.networks.alone import (
    Alone,
    NotLoadedError,
    features_of,
    of_open_clip,
    of_open_clip_source,
    of_timm,
    of_transformers,
)
from visexpert.vision import VisionEncoder

MOST_EXTRA = 64
"""Most tokens around the grid that are skipped: class tokens, registers, detection tokens."""

FORWARD = "its output"


def compare_encoder(encoder: VisionEncoder, pixels: Tensor, tokens: Tensor) -> Comparison | str:
    """Compare an encoder's tokens with its own library; return the reason where that is not possible."""
    try:
        found = encoder.alone()
    except NotLoadedError as error:
        return str(error)
    return found if isinstance(found, str) else _search(tokens, found, pixels)


HEADS = {
    DepthExpert: ("AutoModelForDepthEstimation",),
    SegmentationExpert: ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
}
"""Of experts that predict, transformers' classes with their heads."""


def compare_expert(expert: VisionExpert, pixels_BCHW: Tensor, tokens_BSE: Tensor) -> Comparison | str:
    """Compare an expert's tokens with its own library; return the reason where that is not possible."""
    if isinstance(expert, AutoModelExpert):
        if expert.described.source is None:
            return "random weights"
        found = of_transformers(expert.described.source, heads=HEADS.get(type(expert), ()), is_whole=False)
        if expert.tokens == "prediction":
            return _predicted(expert, found.call(pixels_BCHW), tokens_BSE)
        return _search(tokens_BSE, found, pixels_BCHW)
    if isinstance(expert, TimmExpert):
        return _search(tokens_BSE, _of_timm_expert(expert), pixels_BCHW)
    if isinstance(expert, OpenClipExpert):
        try:
            return _search(tokens_BSE, _of_open_clip_expert(expert), pixels_BCHW)
        except NotLoadedError as error:
            return str(error)
    return "no other library implements this network"


def _search(tokens_BSE: Tensor, alone: Alone, pixels_BCHW: Tensor) -> Comparison | str:
    found = OutputSearch(tokens_BSE, alone.library).run(alone.network, lambda: alone.call(pixels_BCHW))
    return f"no module of {alone.library} gives tokens of this shape" if found is None else found


def _predicted(expert: VisionExpert, output: Any, tokens_BSE: Tensor) -> Comparison | str:
    """Compare the predicted map; depth is scaled to [0, 1] in each image."""
    if "predicted_depth" in output:
        depth_BHW = output.predicted_depth
        least, most = depth_BHW.amin((1, 2), keepdim=True), depth_BHW.amax((1, 2), keepdim=True)
        map_BEHW = ((depth_BHW - least) / (most - least).clamp_min(1e-6))[:, None]
    elif "logits" in output:
        map_BEHW = output.logits.softmax(1)
    else:
        return "masks and classes, which the library combines only for one image at a time"
    where = f"transformers: its {'depth' if 'predicted_depth' in output else 'logits'}"
    return Comparison.of("prediction", where, tokens_BSE, map_BEHW.flatten(2).transpose(1, 2))


def _of_timm_expert(expert: TimmExpert) -> Alone:
    import timm

    described, size = expert.described, expert.preprocessing.image_size
    if expert.weights != RANDOM:
        return of_timm(described, described.source or ModelSource.parse(str(expert.weights)), size)
    options = {"num_classes": 0, **described.sized(size)}
    model: nn.Module = timm.create_model(described.architecture, pretrained=False, **options)
    model.load_state_dict(expert.network.get_submodule("model").state_dict(), strict=True)
    return features_of(model)


def _of_open_clip_expert(expert: OpenClipExpert) -> Alone:
    name, source, size = str(expert.facts["model"]), expert.source, expert.image_size
    if source is not None:
        return of_open_clip_source(name, source, size)
    found = of_open_clip(name, None, size)
    found.network.load_state_dict(expert.network.get_submodule("visual").state_dict(), strict=True)
    return found


class OutputSearch:
    """Finds the module of a library's model whose output equals given tokens.

    Args:
        tokens_BSE: Tokens that visexpert computes.
        library: Name of the library, for the result.
    """

    def __init__(self, tokens_BSE: Tensor, library: str) -> None:
        self.tokens_BSE = tokens_BSE
        self.library = library
        self.best: Comparison | None = None
        self._depth = 0

    def run(self, network: nn.Module, call: Callable[[], Any]) -> Comparison | None:
        """Call the model and return the closest output; None if no output has the tokens' shape."""
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
        """Compare each tensor of a module's output with the tokens, at every position where they fit."""
        for place, tensor in tensors_in(output):
            where = f"{self.library}: {name}{place}"
            depth = 0 if name == FORWARD else 1 + name.count(".")
            for part, rows_BSE in self._candidates(tensor):
                self._take(Comparison.of("tokens", where + part, self.tokens_BSE, rows_BSE), depth)

    def _take(self, found: Comparison, depth: int) -> None:
        """Keep the closest output; among equal ones the outermost module's, and the last of those."""
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
    """Yield each tensor of a module's output, with its path in it."""
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
