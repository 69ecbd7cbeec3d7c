"""Training of an expert on one dense ground truth, with geometric augmentation of image and truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.io.weights import write_weights
from visexpert.tabletop.tiny import TinyExpert, half_state, header_metadata
from visexpert.tabletop.zoo.base import ZooModule, images_of, parameter_count
from visexpert.tabletop.zoo.heads import DenseTask, Ratio
from visexpert.types import Batch


class DenseExpert(ZooModule):
    """A :class:`TinyExpert` that learns one dense task.

    Args:
        arch: Architecture for :class:`TinyExpert`; the head's outputs and activation are the task's.
        task: What is predicted.
        augment: Geometric augmentation, for tasks that allow it.
        lr: Highest learning rate.
        weight_decay: AdamW weight decay.
        warmup: Share of the steps in which the rate rises.
    """

    def __init__(
        self,
        *,
        arch: dict[str, Any],
        task: DenseTask,
        augment: SpatialAugment | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup=warmup)
        network = {**arch.get("network", {}), "outputs": task.outputs, "activation": task.activation}
        self.expert = TinyExpert(arch={**arch, "network": network})
        self.task = task
        self.augment = augment
        self.headline = task.headline
        self.score_definition = task.score_definition
        self._totals: dict[str, Ratio] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict the map, compare it with the truth."""
        images_BCHW, targets = images_of(batch), needed_targets(self.task, batch)
        if self.augment is not None:
            images_BCHW, targets = self.augment(images_BCHW, targets)
        loss = self.task.loss(self.expert.predict(images_BCHW), self._target(targets))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the held-out scores."""
        map_BCHW = self.expert.predict(images_of(batch))
        add_ratios(self._totals, self.task.scores(map_BCHW, self._target(needed_targets(self.task, batch))))

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all held-out scenes."""
        self.log_dict({f"val/{name}": value for name, value in divide(self._totals).items()}, prog_bar=True)
        self._totals = {}

    def ship(self, folder: Path, name: str) -> list[Path]:
        """Write ``NAME.safetensors`` with the architecture in its header."""
        path = folder / f"{name}.safetensors"
        write_weights(half_state(self.expert.network), path, metadata=header_metadata(self.expert.header))
        return [path]

    def facts(self) -> dict[str, Any]:
        """Return kind, sizes and training target for the card."""
        return expert_facts(self.expert) | {"trained_on": f"{type(self.task).__name__}: {', '.join(self.task.needs)}"}

    def _target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return self.task.target(targets, self.expert.network.map_hw)


def needed_targets(task: DenseTask, batch: Batch) -> dict[str, Tensor]:
    """Return the batch's targets that the task needs.

    Raises:
        ConfigError: The batch lacks one.
    """
    absent = [name for name in task.needs if name not in batch.targets]
    if absent:
        raise ConfigError(
            f"{type(task).__name__} needs the dense truth {absent}, but the data yields {sorted(batch.targets)}; "
            "set with_targets: true on TabletopData."
        )
    return {name: batch.targets[name] for name in task.needs}


@torch.no_grad()
def score_expert(expert: TinyExpert, task: DenseTask, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the scores of a trained expert on any scenes; on held-out ones its card states them."""
    expert.eval()
    totals: dict[str, Ratio] = {}
    for batch in batches:
        map_BCHW = expert.predict(images_of(batch))
        truth_BCHW = task.target(needed_targets(task, batch), expert.network.map_hw)
        add_ratios(totals, task.scores(map_BCHW, truth_BCHW))
    return divide(totals)


def add_ratios(totals: dict[str, Ratio], ratios: Mapping[str, Ratio]) -> None:
    """Add numerators and denominators to the running sums, in float64."""
    for name, (top, bottom) in ratios.items():
        old_top, old_bottom = totals.get(name, (torch.zeros(()), torch.zeros(())))
        totals[name] = (old_top + top.detach().double(), old_bottom + bottom.detach().double())


def divide(totals: Mapping[str, Ratio]) -> dict[str, float]:
    """Turn summed ratios into scores; a score without cases is left out."""
    return {name: float(top / bottom) for name, (top, bottom) in totals.items() if bottom}


def expert_facts(expert: TinyExpert) -> dict[str, Any]:
    """Return card entries that any tiny expert has."""
    return {
        "kind": expert.header["kind"],
        "input_px": expert.image_size,
        "grid": list(expert.grid_hw),
        "token_dim": expert.token_dim,
        "parameters": parameter_count(expert.network),
        "license": expert.license,
    }


class SpatialAugment:
    """Random scale, shift and horizontal flip, the same for an image and its class maps.

    Only for targets that do not depend on the camera: scaled or shifted scenes have no valid depth.

    Args:
        scale: Smallest and largest magnification.
        shift: Largest shift, as a share of the image side.
        flip: Chance of a horizontal flip.
    """

    def __init__(self, *, scale: tuple[float, float] = (0.55, 1.3), shift: float = 0.25, flip: float = 0.5) -> None:
        self.scale = (float(scale[0]), float(scale[1]))
        self.shift = shift
        self.flip = flip

    def __call__(self, images_BCHW: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform images (B, 3, H, W) in [0, 1] and class maps (B, H, W); the border is repeated outside the frame.

        Class maps repeat their border as the image does, so they are -1 outside only where the border is background.
        """
        low, high = self.scale
        B = len(images_BCHW)
        zoom_B = torch.exp(torch.empty(B).uniform_(torch.tensor(low).log().item(), torch.tensor(high).log().item()))
        mirror_B = 1 - 2 * (torch.rand(B) < self.flip).float()
        theta_B23 = torch.zeros(B, 2, 3)
        theta_B23[:, 0, 0] = mirror_B / zoom_B
        theta_B23[:, 1, 1] = 1 / zoom_B
        theta_B23[:, :, 2] = (torch.rand(B, 2) * 2 - 1) * 2 * self.shift
        grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
        moved = {
            name: F.grid_sample(
                value_BHW[:, None].float(), grid_BHW2, mode="nearest", padding_mode="border", align_corners=False
            )[:, 0].to(value_BHW.dtype)
            for name, value_BHW in targets.items()
        }
        # Reflection would duplicate objects; the border is table or sky in nearly every scene.
        images_BCHW = F.grid_sample(images_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
        return images_BCHW, moved
