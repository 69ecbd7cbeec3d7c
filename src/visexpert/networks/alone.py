"""Networks that their own library loads alone, from the same files: what ours are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.errors import first_line
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import read_source
from visexpert.networks.huggingface import quiet
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES
from visexpert.networks.timm import DescribedTimm

VISION_PARTS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")
"""Attributes that hold the image encoder of a larger model; models like LLaVA have them inside ``model``."""


class NotLoadedError(Exception):
    """The library cannot load weights that visexpert can, so there is nothing to compare with."""


@dataclass(frozen=True)
class Alone:
    """A network as its library has it.

    Args:
        library: Name of the library.
        network: The network, in eval mode.
        call: Runs it on normalized pixels (B, 3, H, W).
    """

    library: str
    network: nn.Module
    call: Callable[[Tensor], Any]


def of_transformers(source: ModelSource, *, heads: Sequence[str] = (), is_whole: bool = True) -> Alone:
    """Load the vision part of a model.

    Args:
        source: Its folder.
        heads: Names of auto classes, of which the first that knows the model is taken, with its head; none for the
            vision part.
        is_whole: Whether transformers must find all weights.

    Raises:
        NotLoadedError: It does not.
    """
    import transformers

    autos: list[Any] = [getattr(transformers, name) for name in heads] or [transformers.AutoModel]
    folder = folder_of(source, "config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), autos[-1])
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with quiet():
        whole, report = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if is_whole and report["missing_keys"]:  # e.g. torch.compile's prefix, which our reader removes
            state = dict(read_source(source, owner="visexpert try", names=WEIGHT_FILES).tensors)
            whole, report = type(whole).from_pretrained(
                None, config=whole.config, state_dict=state, trust_remote_code=False, **options
            )
    part = whole.eval() if heads else _vision_part(whole.eval())
    needed = set(part.parameters())
    if is_whole and any(whole.get_parameter(key) in needed for key in report["missing_keys"]):
        raise NotLoadedError("transformers expects these weights under other names")
    return Alone("transformers", part, lambda pixels_BCHW: part(**_inputs(part, pixels_BCHW)))


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


def of_timm(described: DescribedTimm, source: ModelSource, image_size: int) -> Alone:
    """Load a folder with timm's ``config.json``, or a file of weights."""
    import timm

    options = described.sized(image_size)
    if source.file is None and source.find("config.json") is not None:
        folder = folder_of(source, "config.json")
        return features_of(timm.create_model(f"local-dir:{folder}", pretrained=True, **options))
    overlay = {"file": str(source.file or source.find(*WEIGHT_FILES)), "num_classes": described.num_classes}
    if described.drops_head:
        overlay.pop("num_classes")
    options["num_classes"] = described.num_classes
    named = timm.create_model(described.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    return features_of(named)


def features_of(model: nn.Module) -> Alone:
    """Return a model of timm, called for its features."""
    return Alone("timm", model.eval(), model.forward_features)  # type: ignore[arg-type]


def of_open_clip_source(name: str, source: ModelSource, size: int) -> Alone:
    """Load a tower by its own configuration, or by its name where there is none."""
    if source.find(OPEN_CLIP_CONFIG) is not None:
        return of_open_clip(f"local-dir:{folder_of(source, OPEN_CLIP_CONFIG)}", None, size)
    return of_open_clip(name, source.file or source.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size)


def of_open_clip(name: str, file: Path | None, size: int | None, *, tag: str | None = None) -> Alone:
    """Load an image tower; its weights are random without a file.

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
    return Alone("open_clip", visual, visual)


def folder_of(source: ModelSource, name: str) -> Path:
    """Return the folder of a file that was found before."""
    path = source.find(name)
    assert path is not None  # it was loaded
    return path.parent


def _vision_part(model: nn.Module) -> nn.Module:
    """Return the image encoder of a larger model; the model itself where none is found."""
    for holder in (model, getattr(model, "model", None)):
        for name in VISION_PARTS:
            part = getattr(holder, name, None)
            if isinstance(part, nn.Module):
                return part
    return model
