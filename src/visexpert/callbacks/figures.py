"""The pictures of a run: curves, gate maps, gates by region, captions, attention and routing of a student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from visexpert.callbacks.run_folder import folder_of
from visexpert.methods import Method
from visexpert.methods.evaluation import Caption, EvalOutput
from visexpert.methods.views import EncoderViews, RoutingViews
from visexpert.names import CLIP
from visexpert.report import gate_by_region, gate_maps, loss_curves, sample_captions
from visexpert.report.curves import distillation_curves
from visexpert.report.figures import cls_attention_maps, router_maps, router_usage
from visexpert.report.palette import spared
from visexpert.types import Batch

LABELS = {CLIP: "frozen encoder"}
"""Labels of encoders in figures, where they differ from the name."""


class RunFigures(Callback):
    """Writes ``figures/`` into the run's folder: curves at the end of training, the rest at the end of a test.

    Args:
        num_maps: Images in maps of attention; half as many in maps of gates and of routers, which take a row each.
        num_captions: Images in the caption figure.
        num_regions: Images averaged in the figure of gates by region (needs instance masks in the data).
        num_routed: Images that the use of a student's routers is counted over; each is encoded again.
    """

    def __init__(
        self, *, num_maps: int = 8, num_captions: int = 16, num_regions: int = 500, num_routed: int = 128
    ) -> None:
        self.num_maps, self.num_captions, self.num_regions = num_maps, num_captions, num_regions
        self.num_routed = num_routed
        self._reset()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)  # which every process must ask
        metrics = folder / "metrics.csv"
        if not trainer.is_global_zero or not metrics.is_file():
            return
        for draw in (loss_curves, distillation_curves):
            with spared(draw.__name__):
                draw(metrics, _figure(folder, draw.__name__))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        output = outputs.get("output") if isinstance(outputs, Mapping) else None
        if not isinstance(output, EvalOutput):
            return
        if isinstance(pl_module, Method):
            self._inside.add(pl_module, batch)
        images_BHW3 = _pixels(batch.images_BCHW)
        gates_BTK = output.vision.gates_BTK
        if gates_BTK is not None:
            self._images += list(images_BHW3[: max(0, self.num_maps - len(self._images))])
            self._gates.append(gates_BTK.unflatten(1, output.vision.grid_hw).float().cpu().numpy())
            if "instance_BHW" in batch.targets:
                self._regions.append(token_regions(batch.targets["instance_BHW"], output.vision.grid_hw))
        for caption in output.captions[: max(0, self.num_captions - len(self._captions))]:
            self._captions.append((images_BHW3[caption.row], caption))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)  # which every process must ask
        if not trainer.is_global_zero:
            return
        if self._gates and isinstance(pl_module, Method):
            with spared("gate_maps"):
                self._draw_gates(folder, pl_module.hub.names)
        with spared("cls_attention, router_maps or router_usage"):
            self._inside.draw(folder / "figures")
        if self._captions:
            with spared("captions"):
                self._draw_captions(folder)
        self._reset()

    def _draw_captions(self, folder: Path) -> None:
        images, captions = zip(*self._captions, strict=True)
        sample_captions(
            np.stack(images),
            [caption.text for caption in captions],
            [caption.correct for caption in captions],
            [caption.item.answer for caption in captions],
            _figure(folder, "captions"),
        )

    def _draw_gates(self, folder: Path, names: tuple[str, ...]) -> None:
        gates_NHWK = np.concatenate(self._gates)
        images = self._images[: max(1, self.num_maps // 2)]  # a row each, so fewer
        gate_maps(np.stack(images), gates_NHWK[: len(images)], names, _figure(folder, "gate_maps"))
        if self._regions:
            regions = {
                name: np.concatenate([part[name] for part in self._regions])[: self.num_regions]
                for name in self._regions[0]
            }
            there = {name: mask for name, mask in regions.items() if mask.any()}
            gate_by_region(gates_NHWK[: self.num_regions], there, names, _figure(folder, "gate_by_region"))

    def _reset(self) -> None:
        self._images: list[NDArray[Any]] = []
        self._gates: list[NDArray[Any]] = []
        self._regions: list[dict[str, NDArray[Any]]] = []
        self._captions: list[tuple[NDArray[Any], Caption]] = []
        self._inside = EncoderFigures(shown=self.num_maps, counted=self.num_routed)


def _figure(folder: Path, name: str) -> Path:
    return folder / "figures" / f"{name}.png"


def token_regions(instance_BHW: Tensor, grid_hw: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Return which tokens lie on an object, across a boundary, or on background.

    Args:
        instance_BHW: Object number per pixel, 0 = background.
        grid_hw: Grid of the tokens.

    Returns:
        Boolean masks (B, H, W) on the grid: ``object`` - at least 90 % of one object; ``background`` - at most 10 %
        object; ``boundary`` - the others.
    """
    classes_BCHW = F.one_hot(instance_BHW.long()).movedim(-1, 1).float()
    shares_BCHW = F.adaptive_avg_pool2d(classes_BCHW, grid_hw)
    whole = (
        shares_BCHW[:, 1:].amax(1) >= 0.9 if shares_BCHW.shape[1] > 1 else torch.zeros_like(shares_BCHW[:, 0]).bool()
    )
    background = shares_BCHW[:, 0] >= 0.9
    masks = {"object": whole, "boundary": ~whole & ~background, "background": background}
    return {name: mask.cpu().numpy() for name, mask in masks.items()}


def _pixels(images_BCHW: Tensor) -> NDArray[Any]:
    """To (B, H, W, 3), uint8."""
    if images_BCHW.dtype != torch.uint8:
        images_BCHW = (images_BCHW * 255).round().to(torch.uint8)
    return images_BCHW.permute(0, 2, 3, 1).cpu().numpy()


class EncoderFigures:
    """[CLS] attention, router choice and router usage over the first images of a test.

    Args:
        shown: Images in the maps.
        counted: Images that usage is counted over.
    """

    def __init__(self, *, shown: int, counted: int) -> None:
        self._shown, self._counted = shown, counted
        self._seen = 0
        self._images: list[NDArray[Any]] = []
        self._attention: dict[str, list[NDArray[Any]]] = {}
        self._probs_LHWE: list[NDArray[Any]] = []
        self._layers: tuple[int, ...] = ()
        self._sums: list[NDArray[Any]] = []

    def add(self, method: Method, batch: Batch) -> None:
        """Collect a batch until there are enough images."""
        if self._seen >= self._counted or (batch.has_image_B is not None and not batch.has_image_B.any()):
            return
        views = method.views(batch)
        if views is None:
            self._seen = self._counted  # later batches have nothing to show either
            return
        self._seen += len(views.images_BCHW)
        self._keep(views, self._shown - len(self._images))
        if views.routing is not None:
            self._count(views.routing)

    def draw(self, folder: Path) -> None:
        """Write the collected figures into ``folder``."""
        if not self._images:
            return
        images = np.stack(self._images)
        if self._attention:
            maps = {LABELS.get(name, name): np.stack(rows) for name, rows in self._attention.items()}
            cls_attention_maps(images, maps, folder / "cls_attention.png")
        if self._probs_LHWE:
            shown = images[: max(1, self._shown // 2)]  # a row each, so fewer
            router_maps(shown, np.stack(self._probs_LHWE[: len(shown)]), self._layers, folder / "router_maps.png")
            share_LE, probability_LE = np.sum(self._sums, axis=0) / self._seen
            over = f"{self._seen} test images"
            router_usage(share_LE, probability_LE, self._layers, folder / "router_usage.png", over=over)

    def _keep(self, views: EncoderViews, room: int) -> None:
        images_BHWC = _array(views.images_BCHW.permute(0, 2, 3, 1)[: max(0, room)])
        self._images += list(images_BHWC)
        for name, shares_BHW in views.attention.items():
            self._attention.setdefault(name, []).extend(_array(shares_BHW[: len(images_BHWC)]))
        if views.routing is not None:
            self._probs_LHWE += list(_array(views.routing.probs_BLHWE[: len(images_BHWC)]))

    def _count(self, routing: RoutingViews) -> None:
        """Sum over images of each expert's share of tokens and of its mean probability, (2, L, E)."""
        probs_BLHWE = routing.probs_BLHWE
        chosen_BLHWE = routing.choice_BLHW[..., None] == probs_BLHWE.new_tensor(range(probs_BLHWE.shape[-1])).long()
        parts = (chosen_BLHWE.to(probs_BLHWE.dtype), probs_BLHWE)
        self._sums.append(np.stack([_array(part.mean(dim=(2, 3)).sum(0)) for part in parts]))
        self._layers = routing.layers


def _array(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.float().cpu().numpy()
    return array
