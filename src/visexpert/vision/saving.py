"""Save an encoder as the library that its network is from saves it: same class, same keys, other parts kept."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PreTrainedModel

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.source import ModelSource
from visexpert.io.weights import state_keys
from visexpert.networks.huggingface import config_of, quiet, takes_patches
from visexpert.networks.preprocessing import Preprocessing, settings_of

KEPT = (".json", ".txt", ".model", ".jinja")
"""Endings of a source's small files that a saved folder keeps, such as those of its tokenizer."""

REWRITTEN = ("config.json", "open_clip_config.json", "fidelity.json")
PROCESSOR = "preprocessor_config.json"
RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""PIL's numbers of the filters."""

TRANSFORMERS_USAGE = """\
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER)
vision = getattr(model, "vision_model", model)
output = vision(**processor(images=image, return_tensors="pt"), output_hidden_states=True)
tokens = output.hidden_states[{layer}][:, {prefix}:]  # patch tokens that the run read"""


def save_with_transformers(
    network: PreTrainedModel,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    source: ModelSource | None,
    processor: Mapping[str, Any],
    owner: str,
) -> None:
    """Write a folder of the class that the source's folder names, such as a whole ``SiglipModel`` with its text tower.

    Only the weights of the vision part are replaced; tokenizer files are copied.

    Args:
        network: The encoder's network.
        state: Its weights, as they are to be stored.
        folder: Existing folder.
        source: Files that the network was built from; None for a random network.
        processor: Settings of the image processor, see :func:`processor_settings`.
        owner: Name of the caller, for messages.

    Raises:
        WeightsError: The source is gone, or lacks the vision part.
    """
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    whole = _whole(network, source, owner=owner)
    nn.Module.to(whole, dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    _vision_of(whole, network, owner=owner).load_state_dict(dict(state), strict=True)
    with quiet():
        whole.save_pretrained(folder)
    if whole.__class__ is network.__class__:
        _prefix_keys(folder / "model.safetensors", type(network).__name__, source)
    if source is not None:
        copy_small_files(source.fetch("config.json", owner=owner).parent, folder)
    _write_processor(folder, processor)


PREFIXED = ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel")
PREFIX = "vision_model."
"""Prefix of these classes' keys that transformers 4 writes and both 4 and 5 read. Without it (as 5 writes) 4 warns,
keeps random weights and goes on."""


def save_tower(
    network: PreTrainedModel,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    preprocessing: Preprocessing,
    projection_dim: int | None,
) -> None:
    """Write a CLIP's vision tower alone, with the keys that transformers 4 and 5 read.

    Args:
        network: A ``CLIPVisionModel``.
        state: Its weights.
        folder: Existing folder.
        preprocessing: Preprocessing of images, which are stretched to a square.
        projection_dim: Width of the projection that is left out, if there is one.
    """
    config = tower_config(network, projection_dim)
    config.architectures = [type(network).__name__]
    config.dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    config.save_pretrained(folder)
    named = {PREFIX + key: value for key, value in state.items()}
    save_file(unshared(named), folder / "model.safetensors", metadata={"format": "pt"})
    squashing_processor(preprocessing).save_pretrained(folder)


def tower_config(network: nn.Module, projection_dim: int | None) -> Any:
    """Return a copy of a vision tower's configuration, with the width of a projection that is left out."""
    config: Any = copy.deepcopy(network.config)
    if projection_dim is not None:
        config.projection_dim = projection_dim
    return config


def squashing_processor(preprocessing: Preprocessing) -> CLIPImageProcessor:
    """Return CLIP's processor for images that are stretched to a square, as :meth:`VisionEncoder.preprocess` does."""
    size = dict.fromkeys(("height", "width"), preprocessing.image_size)
    return CLIPImageProcessor(
        do_resize=True,
        size=size,
        resample=RESAMPLE[preprocessing.interpolation],
        do_center_crop=False,
        crop_size=size,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
        do_convert_rgb=True,
    )


def _prefix_keys(path: Path, kind: str, source: ModelSource | None) -> None:
    """Name the weights of a lone vision part as its source does, or else so that transformers 4 reads them, too."""
    own = None if source is None else source.find(path.name)
    keys = () if own is None else state_keys(own) or ()
    if kind in PREFIXED and (not keys or any(key.startswith(PREFIX) for key in keys)):
        save_file({PREFIX + key: value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def _whole(network: PreTrainedModel, source: ModelSource | None, *, owner: str) -> PreTrainedModel:
    """Return the source's whole model, whose vision part has the shapes of a network."""
    if source is None:
        return copy.deepcopy(network)
    own = source.read_json("config.json", owner=owner)
    if own is None:
        raise gone(source, "config.json", owner=owner)
    kind = getattr(transformers, str((own.get("architectures") or [""])[0]), None)
    if kind is None or not issubclass(kind, PreTrainedModel) or kind is type(network):
        return copy.deepcopy(network)
    config = config_of(own, owner=owner) if "vision_config" not in own else kind.config_class(**own)
    part = getattr(config, "vision_config", config)
    if hasattr(part, "image_size"):
        part.image_size = network.config.image_size
    try:
        with quiet():
            whole, report = kind.from_pretrained(
                str(source.fetch_weights(owner=owner).parent),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # positions of another image size, replaced next
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, WeightsError) as error:
        raise gone(source, "weights", owner=owner) from error
    vision = {id(parameter) for parameter in _vision_of(whole, network, owner=owner).parameters()}
    others = {key for key, parameter in whole.named_parameters() if id(parameter) not in vision}
    absent = sorted(others & set(report["missing_keys"]))
    if absent:
        raise WeightsError(
            f"{owner}: the weights of '{source.text}' lack {', '.join(absent[:2])} ... of a {type(whole).__name__}, "
            "which would be written at random; fetch the whole model, or export as onnx or torch_export."
        )
    found: PreTrainedModel = whole
    return found


def _vision_of(whole: nn.Module, network: nn.Module, *, owner: str) -> nn.Module:
    """Return the part of a whole model that is of a network's class."""
    for part in whole.modules():
        if type(part) is type(network):
            return part
    raise WeightsError(
        f"{owner}: a {type(whole).__name__} has no {type(network).__name__}, so the encoder cannot be saved in it; "
        "export it as onnx or torch_export."
    )


def gone(source: ModelSource, what: str, *, owner: str) -> WeightsError:
    """Return the error for a source whose other parts cannot be copied."""
    return WeightsError(
        f"{owner}: the {what} of '{source.text}' cannot be read any more, and the export copies its other parts "
        "(text tower, tokenizer) from there; put it back, or export as onnx or torch_export."
    )


def copy_small_files(origin: Path, folder: Path) -> None:
    """Copy a source's small files that a folder does not have yet, such as those of the tokenizer."""
    for path in sorted(origin.iterdir()):
        index = path.name.endswith(".index.json")
        if path.suffix in KEPT and not index and path.name not in REWRITTEN and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def prepares_squares(network: nn.Module) -> bool:
    """Return whether a network's image processor makes squares; SigLIP 2's may make patches of images of any shape."""
    return not takes_patches(network)


def processor_settings(
    own: Mapping[str, Any] | None,
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    owner: str,
) -> dict[str, Any]:
    """Return the settings of an image processor that prepares images as the encoder does: stretched to a square.

    A SigLIP 2 that takes patches keeps its own settings.
    """
    kept = dict(own or {})
    if not prepares_squares(network):
        return kept
    side = dict.fromkeys(("height", "width"), preprocessing.image_size)
    made = {
        "do_resize": True,
        "size": side,
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_center_crop": False,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    kind = kept.get("image_processor_type") or kept.get("feature_extractor_type") or "CLIPImageProcessor"
    known = settings_of({**kept, "image_processor_type": kind}, owner=owner)
    return {**kept, "image_processor_type": kind} | {name: value for name, value in made.items() if name in known}


def own_processor(source: ModelSource | None, *, owner: str) -> dict[str, Any] | None:
    """Return the settings of a source's image processor; None if it has none here."""
    if source is None:
        return None
    found = source.read_json(PROCESSOR, owner=owner)
    return found or (source.read_json("processor_config.json", owner=owner) or {}).get("image_processor")


def _write_processor(folder: Path, settings: Mapping[str, Any]) -> None:
    if not settings:
        return
    _write_json(folder / PROCESSOR, settings)
    whole = folder / "processor_config.json"
    if whole.is_file():
        written = json.loads(whole.read_text(encoding="utf-8"))
        if "image_processor" in written:
            _write_json(whole, written | {"image_processor": dict(settings)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_with_timm(
    network: nn.Module,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    data: Mapping[str, Any],
    owner: str,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` with timm's ``save_for_hf``; the head stays.

    Args:
        network: The network, made by ``timm.create_model``.
        state: Its weights, as they are to be stored.
        folder: Existing folder.
        settings: The source's ``pretrained_cfg``, without where it came from.
        arguments: Arguments of the model.
        data: Fields of ``pretrained_cfg`` that say how images are prepared.
        owner: Name of the caller, for messages.

    Raises:
        ConfigError: timm cannot write the model's arguments.
    """
    held = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, held)  # the network's own tensors are not copied
    twin.load_state_dict(unshared(state), assign=True)
    try:
        save_for_hf(
            twin,
            str(folder),
            model_config={"pretrained_cfg": {**settings, **data}},
            model_args=dict(arguments),
            safe_serialization=True,
        )
    except ValueError as error:
        raise ConfigError(
            f"{owner}: timm cannot write this model ({error}); export as onnx or torch_export."
        ) from error


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that safetensors takes: contiguous, none sharing memory with another."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        found[key] = value.clone() if shared else value.contiguous()
    return found
