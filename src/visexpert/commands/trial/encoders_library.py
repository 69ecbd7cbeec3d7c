"""Calls of a library's own encoder on normalized pixels, whichever library it is of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.commands.trial.attempt import Comparison
from visexpert.commands.trial.library import Watch, vision_part
from visexpert.errors import first_line
from visexpert.experts import (
    DepthExpert,
    OpenClipExpert,
    SegmentationExpert,
    TimmExpert,
    VisionExpert,
)
from visexpert.experts.huggingface import quiet
from visexpert.experts.maps import RANDOM
from visexpert.experts.transformers import AutoModelExpert
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import read_source
from visexpert.vision import ClipEncoder
from visexpert.vision.published import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, OPEN_CLIP_PREFIX

Call = Callable[[Tensor], Any]


class NotLoadedError(Exception):
    """The library by itself does not read weights that ours does, so that there is nothing to compare."""


def compare_expert(expert: VisionExpert, pixels_BCHW: Tensor, tokens_BSE: Tensor) -> Comparison | str:
    """Hold an expert's tokens against its own library; a sentence where that cannot be asked."""
    if isinstance(expert, AutoModelExpert):
        if expert.described.source is None:
            return "random weights"
        model, call = of_transformers(expert.described.source, type(expert))
        if expert.tokens == "prediction":
            return _predicted(expert, call(pixels_BCHW), tokens_BSE)
        return _watched(tokens_BSE, "transformers", model, lambda: call(pixels_BCHW))
    if isinstance(expert, TimmExpert):
        model = of_timm(expert)
        return _watched(tokens_BSE, "timm", model, lambda: model.forward_features(pixels_BCHW))  # type: ignore[operator]
    if isinstance(expert, OpenClipExpert):
        try:
            return _watched(tokens_BSE, "open_clip", *_of_open_clip_expert(expert, pixels_BCHW))
        except NotLoadedError as error:
            return str(error)
    return "no other library has this network"


def compare_clip(encoder: ClipEncoder, architecture: str | None, pixels: Tensor, tokens: Tensor) -> Comparison | str:
    """The same for the CLIP that is taught."""
    try:
        return _compare_clip(encoder, architecture, pixels, tokens)
    except NotLoadedError as error:
        return str(error)


def _compare_clip(encoder: ClipEncoder, architecture: str | None, pixels: Tensor, tokens: Tensor) -> Comparison | str:
    files = encoder.published.source
    if files is None:
        return "random weights"
    if encoder.published.elsewhere is not None:
        return "LLaVA's own form, which no library here reads"
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
        return _watched(tokens, "transformers", model, lambda: call(pixels))
    else:
        return "weights alone, which no library reads by themselves"
    return _watched(tokens, "open_clip", visual, lambda: visual(pixels))


def _watched(tokens_BSE: Tensor, library: str, network: nn.Module, call: Callable[[], Any]) -> Comparison | str:
    found = Watch(tokens_BSE, library).run(network, call)
    return f"no module of {library} gives tokens of this shape" if found is None else found


def of_transformers(source: ModelSource, kind: type[VisionExpert] | None) -> tuple[nn.Module, Call]:
    """The model as transformers loads it by itself, and how it is called."""
    import transformers

    auto: Any = transformers.AutoModel
    if kind is DepthExpert:
        auto = transformers.AutoModelForDepthEstimation
    elif kind is SegmentationExpert:
        auto = transformers.AutoModelForSemanticSegmentation
    folder = _folder(source, "config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if kind is SegmentationExpert and type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForUniversalSegmentation
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with quiet():
        whole, report = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if kind is None and report["missing_keys"]:  # such as torch.compile's prefix, which our reader takes off
            state = dict(read_source(source, owner="visexpert try", names=WEIGHT_FILES).tensors)
            whole, report = type(whole).from_pretrained(None, config=whole.config, state_dict=state, **options)
    part = vision_part(whole.eval()) if auto is transformers.AutoModel else whole
    needed = set(part.parameters())
    if kind is None and any(whole.get_parameter(key) in needed for key in report["missing_keys"]):
        raise NotLoadedError("transformers does not find these weights under their names")
    return part, lambda pixels_BCHW: part(**_inputs(part, pixels_BCHW))


def _inputs(model: nn.Module, pixels_BCHW: Tensor) -> dict[str, Any]:
    """What a model of transformers takes for square images."""
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
    """The predicted map; depth runs from 0 to 1 in each image."""
    if "predicted_depth" in output:
        depth_BHW = output.predicted_depth
        least, most = depth_BHW.amin((1, 2), keepdim=True), depth_BHW.amax((1, 2), keepdim=True)
        map_BEHW = ((depth_BHW - least) / (most - least).clamp_min(1e-6))[:, None]
    elif "logits" in output:
        map_BEHW = output.logits.softmax(1)
    else:
        return "masks and classes, which the library puts together for one image at a time"
    where = f"transformers: its {'depth' if 'predicted_depth' in output else 'logits'}"
    return Comparison.of("prediction", where, tokens_BSE, map_BEHW.flatten(2).transpose(1, 2))


def of_timm(expert: TimmExpert) -> nn.Module:
    """The model as timm's own loader fills it."""
    import timm

    options = {"num_classes": 0, **expert.arguments}
    if expert.weights == RANDOM:
        model: nn.Module = timm.create_model(expert.model_name, pretrained=False, **options)
        model.load_state_dict(expert.network.get_submodule("model").state_dict(), strict=True)
        return model.eval()
    source = ModelSource.parse(str(expert.weights))
    file = source.file or source.find(*WEIGHT_FILES)
    model = timm.create_model(expert.model_name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options)
    return model.eval()


def _of_open_clip_expert(expert: OpenClipExpert, pixels_BCHW: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
    name, source = str(expert.facts["model"]), expert.source
    size = expert.image_size
    if source is None:
        visual = of_open_clip(name, None, size)
        visual.load_state_dict(expert.network.get_submodule("visual").state_dict(), strict=True)
    elif source.find(OPEN_CLIP_CONFIG) is not None:
        visual = of_open_clip(f"local-dir:{_folder(source, OPEN_CLIP_CONFIG)}", None, size)
    else:
        visual = of_open_clip(name, source.file or source.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size)
    return visual, lambda: visual(pixels_BCHW)


def of_open_clip(name: str, file: Path | None, size: int | None, *, tag: str | None = None) -> nn.Module:
    """The image tower as open_clip's own loader fills it."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    quick = bool(tag and get_pretrained_cfg(name, tag).get("quick_gelu"))
    try:
        model: Any = open_clip.create_model(
            name, pretrained=None if file is None else str(file), force_image_size=size, force_quick_gelu=quick
        )
    except RuntimeError as error:
        raise NotLoadedError(f"open_clip does not load these weights by itself ({first_line(error)})") from error
    visual: nn.Module = model.visual.eval()
    return visual


def _folder(source: ModelSource, name: str) -> Path:
    path = source.find(name)
    assert path is not None  # it was loaded
    return path.parent
