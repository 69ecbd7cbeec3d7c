"""Parameter groups from modules, and the one schedule of methods, zoo and flattening."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from visexpert.errors import ConfigError


@dataclass(frozen=True)
class ParameterGroup:
    """Modules that train at one rate.

    Args:
        name: Shown in logs.
        modules: What trains.
        lr: Peak learning rate.
    """

    name: str
    modules: tuple[nn.Module, ...]
    lr: float


def make_groups(
    groups: Sequence[ParameterGroup], *, weight_decay: float, axes: Mapping[nn.Parameter, int] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with decay; biases, norms and embeddings without.

    Args:
        groups: What trains.
        weight_decay: On matrices.
        axes: Numbers of axes of parameters before a strategy flattened them, as FSDP does; None for those of now.

    Raises:
        ConfigError: Nothing trains.
    """
    axes = axes or {}
    made: list[dict[str, Any]] = []
    for group in groups:
        plain: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for module in group.modules:
            for child in module.modules():
                keep = isinstance(child, nn.Embedding | nn.LayerNorm)
                for parameter in child.parameters(recurse=False):
                    (plain if keep or axes.get(parameter, parameter.ndim) < 2 else decayed).append(parameter)
        unique_plain = list(dict.fromkeys(plain))
        unique_decayed = [p for p in dict.fromkeys(decayed) if p not in set(unique_plain)]
        made += [
            {"params": unique_decayed, "lr": group.lr, "weight_decay": weight_decay, "name": group.name},
            {"params": unique_plain, "lr": group.lr, "weight_decay": 0.0, "name": f"{group.name} (no decay)"},
        ]
    made = [group for group in made if group["params"]]
    if not made:
        raise ConfigError("Nothing trains: every part is frozen; set language_lr above 0 or attach an expert.")
    return made


def adamw_and_cosine(
    groups: Sequence[ParameterGroup],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float,
    warmup_steps: int,
    trainer: Trainer,
    axes: Mapping[nn.Parameter, int] | None = None,
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns: AdamW over the groups, linear warm-up and a cosine to zero, by step.

    Args:
        groups: What trains, each at its own rate.
        lr: Rate of a group without one.
        betas: Of AdamW.
        weight_decay: On matrices.
        warmup_steps: Steps of the warm-up.
        trainer: Knows the number of steps, and whether gradients are scaled.
        axes: See :func:`make_groups`.
    """
    total = int(trainer.estimated_stepping_batches)
    factor = cosine_factor(warmup_steps=warmup_steps, total_steps=total)
    made = make_groups(groups, weight_decay=weight_decay, axes=axes)
    return scheduled(adamw(made, lr=lr, betas=betas, trainer=trainer), factor)


def scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> OptimizerLRScheduler:
    """An optimizer whose rates are multiplied by a factor of the step, from 0."""
    schedule = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adamw(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], trainer: Trainer) -> AdamW:
    """AdamW, fused where that goes with the trainer.

    A fused step also undoes the scale that ``16-mixed`` puts on gradients; clipping must come after that, hence needs
    an optimizer that leaves it to the trainer.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return AdamW(groups, lr=lr, betas=betas, fused=not (scaled and trainer.gradient_clip_val))


def cosine_factor(*, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Linear warm-up over ``warmup_steps``, then half a cosine down to zero at ``total_steps``, by step from 0."""
    warmup = min(warmup_steps, max(1, total_steps // 2))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    return factor
