"""Convert CLIP's vision tower between Hugging Face's and open_clip's names, which split or stack q, k and v."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import ConfigError, WeightsError
from visexpert.networks.timm import is_vit

_STEM = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
"""Hugging Face's name to open_clip's, outside the blocks."""

_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""The same inside a block; each name has a weight and a bias."""

_TOWER = re.compile(r"(|.*?\.)(?:(?:vision_model\.)?pre_layrnorm|(?:visual\.)?ln_pre)\.weight")
"""A weight that every CLIP vision tower has and no other encoder has, with any prefix."""

_QKV = ("q_proj", "k_proj", "v_proj")

_PROJECTION = "visual_projection.weight"
"""Hugging Face's name of the projection, transposed beside open_clip's ``proj``."""

_TANH = {"gelu_new", "gelu_pytorch_tanh"}

_PLAIN: Mapping[str, Any] = {
    "timm_model_name": None,
    "pool_type": "tok",
    "attentional_pool": False,
    "no_ln_pre": False,
    "ls_init_value": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
"""Fields of open_clip's ``vision_cfg``, with the values they must have for the network to be a ``CLIPVisionModel``."""


@dataclass(frozen=True)
class VisionTower:
    """The vision tower of a CLIP.

    Args:
        state: Weights under ``CLIPVisionModel``'s names.
        projection_DP: The projection of the pooled token into the shared space, which that model does not include.
    """

    state: Mapping[str, Tensor]
    projection_DP: Tensor | None


def without_wrapper(keys: Iterable[str]) -> str | None:
    """Return the prefix of the vision tower's weight names, such as ``model.`` from a training script.

    In a LLaVA it is the path to the tower.

    Args:
        keys: Names of weights.

    Returns:
        The prefix, empty for plain files; None if the weights contain no CLIP vision tower.

    Raises:
        WeightsError: There are several towers.
    """
    found = {match[1] for key in keys if (match := _TOWER.fullmatch(key)) is not None}
    if len(found) > 1:
        raise WeightsError(f"the weights hold several vision towers, under {sorted(found)}; give a file with one.")
    return next(iter(found), None)


def to_open_clip(state: Mapping[str, Tensor], *, projection_DP: Tensor | None = None) -> dict[str, Tensor]:
    """Return weights of a ``CLIPVisionModel`` under the names of open_clip's ``VisionTransformer``.

    Args:
        state: State dict of the ``CLIPVisionModel``.
        projection_DP: Projection of the pooled token; None for the identity, so that open_clip's image embedding is
            the pooled output itself.
    """
    converted = {new: state[old] for old, new in _STEM.items()}
    for old, new in _blocks(_depth(state, "encoder.layers.")):
        for kind in ("weight", "bias"):
            stacked = [state[f"{old}.self_attn.{name}.{kind}"] for name in _QKV]
            converted[f"{new}.attn.in_proj_{kind}"] = torch.cat(stacked)
            for source, target in _BLOCK.items():
                converted[f"{new}.{target}.{kind}"] = state[f"{old}.{source}.{kind}"]
    width = state["embeddings.class_embedding"].shape[0]
    converted["proj"] = torch.eye(width) if projection_DP is None else projection_DP
    return converted


def from_open_clip(state: Mapping[str, Tensor]) -> VisionTower:
    """Return the vision tower of an open_clip checkpoint under the names of ``CLIPVisionModel``.

    Args:
        state: State dict of a whole open_clip model (its text tower is left out) or of its ``visual`` alone.

    Raises:
        WeightsError: A weight is missing, or there is one that ``CLIPVisionModel`` does not have.
    """
    vision = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    vision = vision or dict(state)
    projection_DP = vision.pop("proj", None)
    converted: dict[str, Tensor] = {}
    try:
        converted.update({old: vision.pop(new) for old, new in _STEM.items()})
        for old, new in _blocks(_depth(vision, "transformer.resblocks.")):
            for kind in ("weight", "bias"):
                parts = vision.pop(f"{new}.attn.in_proj_{kind}").chunk(len(_QKV))
                # Cloned: safetensors does not write views of one tensor.
                converted |= {
                    f"{old}.self_attn.{name}.{kind}": part.clone() for name, part in zip(_QKV, parts, strict=True)
                }
                for source, target in _BLOCK.items():
                    converted[f"{old}.{source}.{kind}"] = vision.pop(f"{new}.{target}.{kind}")
    except KeyError as error:
        raise WeightsError(f"open_clip weights lack {error}; only plain ViT towers of CLIP can be read.") from error
    if vision:
        raise WeightsError(
            f"open_clip weights hold {sorted(vision)[:3]}, which CLIPVisionModel does not have; only plain ViT "
            "towers of CLIP can be read."
        )
    return VisionTower(converted, projection_DP)


def from_hugging_face(state: Mapping[str, Tensor]) -> VisionTower:
    """Return the vision tower of a checkpoint that transformers wrote, before or after its version 5.

    Args:
        state: State dict of a whole ``CLIPModel`` (its text tower is left out), of ``CLIPVisionModelWithProjection``
            or of ``CLIPVisionModel``. Unknown keys are kept, for the loader to refuse.
    """
    whole = any(key.startswith("text_model.") for key in state)
    projection_PD = state.get(_PROJECTION)
    vision = {
        key.removeprefix("vision_model."): value
        for key, value in state.items()
        # Buffers of positions were written until transformers 4.31; they hold 0, 1, 2, ...
        if key != _PROJECTION and not key.endswith("position_ids") and (not whole or key.startswith("vision_model."))
    }
    return VisionTower(vision, None if projection_PD is None else projection_PD.T.contiguous())


def to_hugging_face(tower: VisionTower) -> dict[str, Tensor]:
    """Return the state dict of a ``CLIPVisionModelWithProjection``, or a ``CLIPVisionModel`` without a projection.

    Both classes read these names in every version of transformers.
    """
    state = {f"vision_model.{key}": value for key, value in tower.state.items()}
    if tower.projection_DP is None:
        return state
    return state | {_PROJECTION: tower.projection_DP.T.contiguous()}


def open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's ``vision_cfg`` and ``quick_gelu`` for a ``CLIPVisionConfig``.

    Raises:
        ConfigError: An activation that open_clip's towers do not have.
    """
    width, hidden = int(config.hidden_size), int(config.intermediate_size)
    vision: dict[str, Any] = {
        "image_size": int(config.image_size),
        "patch_size": int(config.patch_size),
        "layers": int(config.num_hidden_layers),
        "width": width,
        "head_width": width // int(config.num_attention_heads),
        # open_clip computes int(width * ratio): half a channel more keeps the quotient from rounding down.
        "mlp_ratio": hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        "norm_kwargs": {"eps": float(config.layer_norm_eps)},
    }
    if config.hidden_act in _TANH:
        vision["act_kwargs"] = {"approximate": "tanh"}
    elif config.hidden_act not in ("quick_gelu", "gelu"):
        allowed = sorted({"quick_gelu", "gelu", *_TANH})
        raise ConfigError(f"open_clip has no vision tower with hidden_act={config.hidden_act!r}, only {allowed}.")
    return {"quick_gelu": config.hidden_act == "quick_gelu", "vision_cfg": vision}


def clip_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ``CLIPVisionConfig`` for an open_clip ``model_cfg`` (a file of its ``model_configs``).

    Raises:
        ConfigError: The tower is not a plain CLIP ViT.
    """
    vision = dict(model_cfg["vision_cfg"])
    other = {key: vision[key] for key, plain in _PLAIN.items() if vision.get(key, plain) != plain}
    if (trunk := vision.get("timm_model_name")) is not None:
        readable = "class_path: visexpert.vision.OpenClipEncoder reads it"
        raise ConfigError(
            f"open_clip's tower is {trunk} of timm, and ClipEncoder reads plain ViT towers only; "
            f"{readable if is_vit(trunk) else 'as a teacher it can be an OpenClipExpert'}."
        )
    if other or not isinstance(vision.get("layers", 12), int):
        found = other or {"layers": vision["layers"]}
        raise ConfigError(
            f"open_clip's vision_cfg has {found}, and only plain ViT towers of CLIP can be read; use it as a teacher "
            "(class_path: visexpert.experts.OpenClipExpert), or take a plain one, such as ViT-B-16."
        )
    width = int(vision.get("width", 768))
    act = "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu"
    if act == "gelu" and (vision.get("act_kwargs") or {}).get("approximate") == "tanh":
        act = "gelu_pytorch_tanh"
    return {
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        "num_hidden_layers": vision.get("layers", 12),
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_attention_heads": width // vision.get("head_width", 64),
        "layer_norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        "hidden_act": act,
        "projection_dim": int(model_cfg["embed_dim"]),
    }


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(key.removeprefix(prefix).split(".", 1)[0]) for key in state if key.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _blocks(depth: int) -> Iterator[tuple[str, str]]:
    for index in range(depth):
        yield f"encoder.layers.{index}", f"transformer.resblocks.{index}"
