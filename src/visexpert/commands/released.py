"""Read MoVE-KD's released files (hey-cjj/MoVE-KD at c822da0), and rename their tensors to our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import WeightsError
from visexpert.io.reading import read_object
from visexpert.io.weights import load_state

OWNER = "visexpert import"
STAGE_1 = ("mm_projector.bin", "mole_encoder.bin", "encoder_adapter.bin")
STAGE_2 = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")

_TOWER = re.compile(r"^(?:model\.)?vision_tower\.vision_tower\.vision_model\.")
_PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.")
_ADAPTER = re.compile(r"^(\w+)_adapter_([12])\.(weight|bias)$")
_LANGUAGE = re.compile(r"^(?:model\.(?:embed_tokens|layers|norm)|lm_head)\.")
_EXPERT = re.compile(r"^(.*\.mlp)\.moe_(down|up)\.(\d+)\.lora_([AB])\.(weight|bias)$")
_NOT_WEIGHTS = re.compile(r"(\.rotary_emb\.inv_freq|embeddings\.position_ids)$")

LAYERS = {"down": "fc1_experts", "up": "fc2_experts"}
"""``moe_down`` is parallel to CLIP's first linear layer (width to hidden), ``moe_up`` to its second."""


@dataclass
class Released:
    """Released weights by part.

    Args:
        student: CLIP and MoLE under the names of ``CLIPVisionModel`` and :func:`visexpert.vision.add_mole`.
        projector: Under the names of :class:`~visexpert.language.Projector`.
        adapters: Encoder adapters by teacher, under the names of ``ReleasedAdapter``.
        config: ``config.json``, {} where there is none.
        has_clip: Whether the student's CLIP weights are included (stage 2).
        has_language: Whether the language model's are.
    """

    student: dict[str, Tensor] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    has_clip: bool = False
    has_language: bool = False


def read_released(folder: Path) -> Released:
    """Read all weights but the language model's.

    Raises:
        WeightsError: The folder holds the files of neither stage, or tensors that are not MoVE-KD's.
    """
    found = Released(config=_read_config(folder))
    plain: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for key, value in load_state(path, owner=OWNER).items():
            _sort(key, value, found, plain)
    found.student = stack_experts(plain)
    found.has_clip = "embeddings.class_embedding" in found.student
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files of stage 1, or all parts of a stage-2 checkpoint.

    Raises:
        WeightsError: The folder has neither, or the list of parts names files outside of it.
    """
    whole = next((folder / name for name in STAGE_2 if (folder / name).is_file()), None)
    if whole is None:
        parts = [folder / name for name in STAGE_1 if (folder / name).is_file()]
        if not parts or parts[0].name != STAGE_1[0]:
            raise WeightsError(
                f"{OWNER}: {folder} holds neither {STAGE_1[0]} (stage 1) nor one of {', '.join(STAGE_2)} (stage 2); "
                "give a folder that MoVE-KD's training wrote."
            )
        return parts
    if whole.suffix != ".json":
        return [whole]
    names = sorted(set(_read_json(whole).get("weight_map", {}).values()))
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise WeightsError(f"{OWNER}: {whole} lists {names[:3]}, which are not files beside it; do not trust it.")
    return [folder / name for name in names]


def language_tensors(path: Path) -> dict[str, Tensor]:
    """Return the language model's weights in one file, under the names of ``LlamaForCausalLM``."""
    state = load_state(path, owner=OWNER)
    return {key: value for key, value in state.items() if _LANGUAGE.match(key) and not _NOT_WEIGHTS.search(key)}


def stack_experts(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the tensors of MoLE's experts, each of which has two linear layers of its own.

    ``lora_A.weight`` (R, in), ``lora_A.bias`` (R,), ``lora_B.weight`` (out, R) and ``lora_B.bias`` (out,) of E experts
    become ``A_weight`` (E, R, in), ``A_bias`` (E R,), ``B_weight`` (E, R, out) and ``B_bias`` (E out,). The scale
    alpha / R is in neither. Routers keep their names; the wrapped MLP's lose ``original_module``.

    Raises:
        WeightsError: An expert or a part of one is missing.
    """
    stacked: dict[str, Tensor] = {}
    groups: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key, value in plain.items():
        expert = _EXPERT.match(key)
        if expert is None:
            stacked[key.replace(".mlp.original_module.", ".mlp.")] = value
            continue
        mlp, side, number, factor, kind = expert.groups()
        turned = value.T if (factor, kind) == ("B", "weight") else value
        groups.setdefault((f"{mlp}.{LAYERS[side]}", f"{factor}_{kind}"), {})[int(number)] = turned
    for (layer, name), parts in groups.items():
        if sorted(parts) != list(range(len(parts))):
            raise WeightsError(f"{OWNER}: {layer} lacks experts, it has {sorted(parts)}; fetch the files again.")
        ordered = [parts[number] for number in range(len(parts))]
        stacked[f"{layer}.{name}"] = torch.stack(ordered) if name.endswith("weight") else torch.cat(ordered)
    return stacked


@dataclass(frozen=True)
class MoLEShape:
    """Sizes of MoLE, read from the weights.

    Args:
        num_experts: Number of experts.
        rank: Their rank.
        blocks: Blocks of CLIP that have MoLE.
    """

    num_experts: int
    rank: int
    blocks: tuple[int, ...]


def mole_shape(student: Mapping[str, Tensor]) -> MoLEShape | None:
    """Return the sizes of MoLE; None if the student has none.

    Raises:
        WeightsError: The sizes differ between blocks.
    """
    factors = {key: value for key, value in student.items() if key.endswith(".mlp.fc1_experts.A_weight")}
    if not factors:
        return None
    sizes = {tuple(value.shape[:2]) for value in factors.values()}
    if len(sizes) > 1:
        raise WeightsError(f"{OWNER}: MoLE's blocks must have one size, got {sorted(sizes)}; fetch the files again.")
    ((num_experts, rank),) = sizes
    return MoLEShape(num_experts, rank, tuple(sorted(int(key.split(".")[2]) for key in factors)))


def _sort(key: str, value: Tensor, found: Released, plain: dict[str, Tensor]) -> None:
    adapter = _ADAPTER.match(key.removeprefix("model."))
    if _NOT_WEIGHTS.search(key):
        return
    if _TOWER.match(key):
        plain[_TOWER.sub("", key)] = value
    elif _PROJECTOR.match(key):
        found.projector[_PROJECTOR.sub("layers.", key)] = value
    elif adapter is not None:
        teacher, number, kind = adapter.groups()
        layer = {"1": "channels", "2": "tokens"}[number]
        found.adapters.setdefault(teacher, {})[f"{layer}.{kind}"] = value
    elif _LANGUAGE.match(key):
        found.has_language = True
    else:
        raise WeightsError(
            f"{OWNER}: {key!r} is not a name that MoVE-KD writes; give the files as its training wrote them."
        )


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, error=WeightsError, owner=OWNER, step="fetch it again")


def absent_parts(adapter: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that an encoder adapter lacks."""
    wanted = {f"{layer}.{kind}" for layer in ("channels", "tokens") for kind in ("weight", "bias")}
    return sorted(wanted - set(adapter))
