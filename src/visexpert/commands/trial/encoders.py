"""Compare an encoder's tokens with those of its own library, computed from the same normalized pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.commands.trial.attempt import Comparison
from visexpert.errors import first_line
from visexpert.experts import (
    DepthExpert,
    OpenClipExpert,
    SegmentationExpert,
    TimmExpert,
    VisionExpert,
)
from visexpert.experts.transformers import AutoModelExpert
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import read_source
from visexpert.networks import RANDOM
from visexpert.networks.huggingface import quiet
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, OPEN_CLIP_PREFIX
from visexpert.networks.timm import DescribedTimm
from visexpert.vision import ClipEncoder, OpenClipEncoder, TimmEncoder, TransformersEncoder, VisionEncoder

Call = Callable[[Tensor], Any]

VISION_PARTS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")
"""Attributes that hold the image encoder of a larger model; models like LLaVA have them inside ``model``."""

MOST_EXTRA = 64
"""Most tokens around the grid that are skipped: class tokens, registers, detection tokens."""

FORWARD = "its output"


class NotLoadedError(Exception):
    """The library cannot load weights that visexpert can, so there is nothing to compare with."""


def compare_expert(expert: VisionExpert, pixels_BCHW: Tensor, tokens_BSE: Tensor) -> Comparison | str:
    """Compare an expert's tokens with its own library; return the reason where that is not possible."""
    if isinstance(expert, AutoModelExpert):
        if expert.described.source is None:
            return "random weights"
        model, call = of_transformers(expert.described.source, type(expert))
        if expert.tokens == "prediction":
            return _predicted(expert, call(pixels_BCHW), tokens_BSE)
        return _search(tokens_BSE, "transformers", model, lambda: call(pixels_BCHW))
    if isinstance(expert, TimmExpert):
        model = of_timm(expert)
        return _search(tokens_BSE, "timm", model, lambda: model.forward_features(pixels_BCHW))  # type: ignore[operator]
    if isinstance(expert, OpenClipExpert):
        try:
            return _search(tokens_BSE, "open_clip", *_of_open_clip_expert(expert, pixels_BCHW))
        except NotLoadedError as error:
            return str(error)
    return "no other library implements this network"


def compare_encoder(encoder: VisionEncoder, pixels: Tensor, tokens: Tensor) -> Comparison | str:
    """Compare an encoder's tokens with its own library; return the reason where that is not possible."""
    if encoder.source is None:
        return "random weights"
    try:
        if isinstance(encoder, ClipEncoder):
            return _compare_clip(encoder, encoder._given["architecture"], pixels, tokens)
        if isinstance(encoder, TransformersEncoder):
            assert encoder.described.source is not None
            model, call = of_transformers(encoder.described.source, None)
            return _search(tokens, "transformers", model, lambda: call(pixels))
        if isinstance(encoder, TimmEncoder):
            assert encoder.described.source is not None
            model = _by_timm(encoder.described, encoder.described.source, encoder.image_size)
            return _search(tokens, "timm", model, lambda: model.forward_features(pixels))  # type: ignore[operator]
        if isinstance(encoder, OpenClipEncoder):
            described = encoder.described
            visual = _of_described(str(described.model), described.source, encoder.image_size)
            return _search(tokens, "open_clip", visual, lambda: visual(pixels))
    except NotLoadedError as error:
        return str(error)
    return "no other library implements this network"


def _compare_clip(encoder: ClipEncoder, architecture: str | None, pixels: Tensor, tokens: Tensor) -> Comparison | str:
    files = encoder.published.source
    if files is None:
        return "random weights"
    if encoder.published.elsewhere is not None:
        return "weights in LLaVA's format, which no library here reads"
    size = encoder.image_size if encoder.resized else None
    if files.text.startswith(OPEN_CLIP_PREFIX):
        name, _, tag = files.text.removeprefix(OPEN_CLIP_PREFIX).partition("/")
        visual = of_open_clip(name, files.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size, tag=tag)
    elif architecture is not None:
        visual = of_open_clip(architecture, files.file or files.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size)
    elif files.find(OPEN_CLIP_CONFIG) is not None:
        visual = of_open_clip(f"local-dir:{_folder(files, OPEN_CLIP_CONFIG)}", None, size)
    elif files.find("config.json") is not None:
        model, call = of_transformers(files, None)
        return _search(tokens, "transformers", model, lambda: call(pixels))
    else:
        return "weights without a configuration, which no library reads"
    return _search(tokens, "open_clip", visual, lambda: visual(pixels))


def _search(tokens_BSE: Tensor, library: str, network: nn.Module, call: Callable[[], Any]) -> Comparison | str:
    found = OutputSearch(tokens_BSE, library).run(network, call)
    return f"no module of {library} gives tokens of this shape" if found is None else found


def of_transformers(source: ModelSource, kind: type[VisionExpert] | None) -> tuple[nn.Module, Call]:
    """Load the model with transformers alone; return it and a function that calls it."""
    import transformers

    auto: Any = transformers.AutoModel
    if kind is DepthExpert:
        auto = transformers.AutoModelForDepthEstimation
    elif kind is SegmentationExpert:
        auto = transformers.AutoModelForSemanticSegmentation
    folder = _folder(source, "config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if kind is SegmentationExpert and type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForUniversalSegmentation
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with quiet():
        whole, report = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if kind is None and report["missing_keys"]:  # e.g. torch.compile's prefix, which our reader removes
            state = dict(read_source(source, owner="visexpert try", names=WEIGHT_FILES).tensors)
            whole, report = type(whole).from_pretrained(
                None, config=whole.config, state_dict=state, trust_remote_code=False, **options
            )
    part = vision_part(whole.eval()) if auto is transformers.AutoModel else whole
    needed = set(part.parameters())
    if kind is None and any(whole.get_parameter(key) in needed for key in report["missing_keys"]):
        raise NotLoadedError("transformers expects these weights under other names")
    return part, lambda pixels_BCHW: part(**_inputs(part, pixels_BCHW))


def _inputs(model: nn.Module, pixels_BCHW: Tensor) -> dict[str, Any]:
    """Return the arguments of a transformers model for square images."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "spatial_shapes" in takes:  # patches of images of any shape (SigLIP 2, NaFlex)
        side = int(config.patch_size)
        patches_BEN = torch.nn.functional.unfold(pixels_BCHW, side, stride=side)  # channels, then rows, then columns
        batch, _, count = patches_BEN.shape
        patches = patches_BEN.view(batch, 3, side, side, count).permute(0, 4, 2, 3, 1).flatten(2)
        grid = torch.tensor([[int(pixels_BCHW.shape[-1]) // side] * 2] * batch)
        mask = "pixel_attention_mask" if "pixel_attention_mask" in takes else "attention_mask"
        return {"pixel_values": patches, mask: torch.ones(batch, count, dtype=torch.long), "spatial_shapes": grid}
    name = "pixel_values" if "pixel_values" in takes else next(iter(takes))
    other = getattr(config, "image_size", None) not in (None, int(pixels_BCHW.shape[-1]))
    return {
        name: pixels_BCHW,
        **({"interpolate_pos_encoding": True} if other and "interpolate_pos_encoding" in takes else {}),
        **({"output_hidden_states": True} if "output_hidden_states" in takes else {}),
    }


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


def of_timm(expert: TimmExpert) -> nn.Module:
    """Load the model with timm alone."""
    import timm

    described, size = expert.described, expert.preprocessing.image_size
    if expert.weights != RANDOM:
        return _by_timm(described, described.source or ModelSource.parse(str(expert.weights)), size)
    options = {"num_classes": 0, **described.sized(size)}
    model: nn.Module = timm.create_model(described.architecture, pretrained=False, **options)
    model.load_state_dict(expert.network.get_submodule("model").state_dict(), strict=True)
    return model.eval()


def _by_timm(described: DescribedTimm, source: ModelSource, image_size: int) -> nn.Module:
    """Load a folder with timm's ``config.json``, or a file of weights, with timm alone."""
    import timm

    options = described.sized(image_size)
    if source.file is None and source.find("config.json") is not None:
        folder = _folder(source, "config.json")
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    overlay = {"file": str(source.file or source.find(*WEIGHT_FILES)), "num_classes": described.num_classes}
    if described.drops_head:
        overlay.pop("num_classes")
    options["num_classes"] = described.num_classes
    return timm.create_model(described.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def _of_open_clip_expert(expert: OpenClipExpert, pixels_BCHW: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
    name, source = str(expert.facts["model"]), expert.source
    size = expert.image_size
    if source is None:
        visual = of_open_clip(name, None, size)
        visual.load_state_dict(expert.network.get_submodule("visual").state_dict(), strict=True)
    else:
        visual = _of_described(name, source, size)
    return visual, lambda: visual(pixels_BCHW)


def _of_described(name: str, source: ModelSource | None, size: int) -> nn.Module:
    """Load a tower by its own configuration, or by its name where there is none."""
    assert source is not None
    if source.find(OPEN_CLIP_CONFIG) is not None:
        return of_open_clip(f"local-dir:{_folder(source, OPEN_CLIP_CONFIG)}", None, size)
    return of_open_clip(name, source.file or source.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size)


def of_open_clip(name: str, file: Path | None, size: int | None, *, tag: str | None = None) -> nn.Module:
    """Load the image tower with open_clip alone.

    Raises:
        NotLoadedError: open_clip does not read these weights.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    quick = bool(tag and get_pretrained_cfg(name, tag).get("quick_gelu"))
    try:
        model: Any = open_clip.create_model(
            name, pretrained=None if file is None else str(file), force_image_size=size, force_quick_gelu=quick
        )
    except RuntimeError as error:
        raise NotLoadedError(f"open_clip cannot load these weights ({first_line(error)})") from error
    visual: nn.Module = model.visual.eval()
    return visual


def _folder(source: ModelSource, name: str) -> Path:
    path = source.find(name)
    assert path is not None  # it was loaded
    return path.parent


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


def vision_part(model: nn.Module) -> nn.Module:
    """Return the image encoder of a larger model; the model itself where none is found."""
    for holder in (model, getattr(model, "model", None)):
        for name in VISION_PARTS:
            part = getattr(holder, name, None)
            if isinstance(part, nn.Module):
                return part
    return model
