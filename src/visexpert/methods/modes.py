"""Train mode for what trains, eval mode for all else."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def settle_modes(module: nn.Module, trained: set[int]) -> None:
    """Put every part that has parameters, none of which trains, into eval mode: no dropout, no noise.

    Parts that keep statistics of what they see (``keeps_statistics``) stay as they are, whatever trains in them.

    Args:
        module: In train mode; changed in place.
        trained: The ``id`` of each parameter that trains.
    """
    for child in module.children():
        own = {id(parameter) for parameter in child.parameters()}
        if not own:
            continue
        if own & trained or any(getattr(part, "keeps_statistics", False) for part in child.modules()):
            settle_modes(child, trained)
        else:
            child.eval()
            _keep_checkpointing(child)


def _keep_checkpointing(part: nn.Module) -> None:
    """Let blocks that save memory by computing activations anew do so: transformers does it in train mode alone.

    What is inside such a block stays in eval mode. A block with dropout of its own would drop, too, and is left out.
    """
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            own = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]
            layer.training = not any(own)
