"""LoRA on CLIP through peft: add it, and fold it back into the weights."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from visexpert.errors import ConfigError
from visexpert.vision.clip import ClipEncoder

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""Every linear layer of a CLIP block."""


class ClipLora:
    """Low-rank updates on every linear layer of a CLIP; its base weights are frozen.

    Args:
        clip: The encoder, changed in place.
        rank: Rank of each update.
        alpha: Updates are scaled by alpha / rank.

    Raises:
        ConfigError: The rank is below 1.
    """

    def __init__(self, clip: ClipEncoder, *, rank: int, alpha: float) -> None:
        if rank < 1:
            raise ConfigError(f"LoRA: rank must be at least 1, got {rank}.")
        clip.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)  # type: ignore[arg-type]
        self._clip = clip
        self._lora = LoraModel(clip.model, config, "default")

    def modules(self) -> tuple[nn.Module, ...]:
        """Return the low-rank factors of the layers in use."""
        read = [layer for part in self._clip.read_modules() for layer in part.modules() if isinstance(layer, LoraLayer)]
        return tuple(part for layer in read for part in (layer.lora_A, layer.lora_B))

    def merge(self) -> None:
        """Add the updates to the weights and remove every trace of LoRA: keys and shapes are CLIP's own again."""
        self._lora.merge_and_unload()
