"""Dense tasks: ground truth of a batch -> target map, loss and held-out scores. One class per kind of truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.tabletop.tiny import Activation
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES

Targets = Mapping[str, Tensor]
Ratio = tuple[Tensor, Tensor]
"""Numerator and denominator of a score, summed over batches before they are divided."""

MOSTLY = 0.9
"""Share of a cell that objects must cover for it to count as inside an object."""


class DenseTask(ABC):
    """One kind of dense truth.

    Targets are the ``Batch.targets`` of Tabletop at the images' own size; ``target`` reduces them to the cells of the
    expert's map, ``loss`` and ``scores`` compare a raw map (B, C, h, w) with that.
    """

    outputs: dict[str, int]
    """Channels of the map by name."""
    activation: Activation = "none"
    """How a raw map becomes a prediction."""
    needs: tuple[str, ...]
    """Names in ``Batch.targets`` that are read."""
    headline: str
    """Key of the main score in ``scores``."""
    score_definition: str
    """What the headline measures."""

    @abstractmethod
    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        """Return truth per map cell (B, C', h, w), float32."""

    @abstractmethod
    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Return the scalar loss of a raw map."""

    @abstractmethod
    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        """Return named scores as numerator and denominator."""


class AttributeTask(DenseTask):
    """Which colour, shape and material each cell shows; the last class of each is "no object".

    The truth of a cell is the share of its pixels per class (soft labels), so a cell on a boundary need not choose.
    """

    words = {"colour": COLOURS, "shape": SHAPES, "material": MATERIALS}
    outputs = {name: len(words) + 1 for name, words in words.items()}
    activation = "softmax"
    needs = ("colour_BHW", "shape_BHW", "material_BHW")
    headline = "attribute_accuracy"
    score_definition = (
        f"mean accuracy (%) over colour, shape and material of the map's most likely word in cells that objects cover "
        f"by at least {MOSTLY:.0%}; higher is better"
    )

    def __init__(self, *, object_weight: float = 4.0) -> None:
        """Set the loss weight.

        Args:
            object_weight: Weight of a cell full of objects, relative to an empty cell.
        """
        self.object_weight = object_weight

    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        parts = [_class_shares(targets[f"{name}_BHW"], len(words), cells_hw) for name, words in self.words.items()]
        return torch.cat(parts, dim=1)

    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        weight_BHW = 1 + (self.object_weight - 1) * (1 - self._split(target_BCHW)["colour"][:, -1])
        terms = [
            (F.cross_entropy(said, true, reduction="none") * weight_BHW).mean()
            for said, true in zip(self._split(map_BCHW).values(), self._split(target_BCHW).values(), strict=True)
        ]
        return torch.stack(terms).sum()

    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        said, true = self._split(map_BCHW), self._split(target_BCHW)
        inside_BHW = true["colour"][:, -1] <= 1 - MOSTLY
        hits = {name: (said[name][:, :-1].argmax(1) == true[name][:, :-1].argmax(1))[inside_BHW].sum() for name in said}
        count = inside_BHW.sum()
        ratios = {f"{name}_accuracy": (100 * hit, count) for name, hit in hits.items()}
        return {**ratios, self.headline: (100 * torch.stack(list(hits.values())).sum(), count * len(hits))}

    def _split(self, map_BCHW: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.outputs, map_BCHW.split(list(self.outputs.values()), dim=1), strict=True))


class DepthTask(DenseTask):
    """Log-depth of each cell (natural log of scene units)."""

    outputs = {"log_depth": 1}
    needs = ("depth_BHW", "instance_BHW")
    headline = "object_error"
    score_definition = (
        f"mean absolute log-depth error x100 (about per cent of the distance) in map cells that objects cover by at "
        f"least {MOSTLY:.0%}; lower is better"
    )

    def __init__(self, *, object_weight: float = 8.0, center: float = 2.1) -> None:
        """Set the loss weight and the offset.

        Args:
            object_weight: Weight of a cell full of objects, relative to an empty cell: the table is easy.
            center: Log-depth that a raw output of 0 stands for.
        """
        self.object_weight = object_weight
        self.center = center

    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        depth_B1HW = _to_cells(targets["depth_BHW"].float().log()[:, None], cells_hw) - self.center
        return torch.cat([depth_B1HW, _object_share(targets["instance_BHW"], cells_hw)], dim=1)

    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        weight_BHW = 1 + (self.object_weight - 1) * target_BCHW[:, 1]
        error_BHW = F.smooth_l1_loss(map_BCHW[:, 0], target_BCHW[:, 0], reduction="none", beta=0.02)
        return (error_BHW * weight_BHW).sum() / weight_BHW.sum() * 10

    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        error_BHW = 100 * (map_BCHW[:, 0] - target_BCHW[:, 0]).abs()
        inside_BHW = target_BCHW[:, 1] >= MOSTLY
        return {
            self.headline: (error_BHW[inside_BHW].sum(), inside_BHW.sum()),
            "error": (error_BHW.sum(), torch.tensor(error_BHW.numel())),
        }


class NormalsTask(DenseTask):
    """Unit surface normal of each cell, camera frame."""

    outputs = {"normal": 3}
    activation = "unit"
    needs = ("normals_B3HW", "instance_BHW")
    headline = "object_error"
    score_definition = (
        f"mean of 1 - cosine between predicted and true normal, x100, in map cells that objects cover by at least "
        f"{MOSTLY:.0%}; lower is better"
    )

    def __init__(self, *, object_weight: float = 6.0) -> None:
        """Set the loss weight.

        Args:
            object_weight: Weight of a cell full of objects, relative to an empty cell.
        """
        self.object_weight = object_weight

    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        normal_B3HW = F.normalize(_to_cells(targets["normals_B3HW"].float(), cells_hw), dim=1)
        return torch.cat([normal_B3HW, _object_share(targets["instance_BHW"], cells_hw)], dim=1)

    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        weight_BHW = 1 + (self.object_weight - 1) * target_BCHW[:, 3]
        error_BHW = 1 - F.cosine_similarity(map_BCHW, target_BCHW[:, :3], dim=1)
        return (error_BHW * weight_BHW).sum() / weight_BHW.sum()

    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        error_BHW = 100 * (1 - F.cosine_similarity(map_BCHW, target_BCHW[:, :3], dim=1))
        inside_BHW = target_BCHW[:, 3] >= MOSTLY
        return {
            self.headline: (error_BHW[inside_BHW].sum(), inside_BHW.sum()),
            "error": (error_BHW.sum(), torch.tensor(error_BHW.numel())),
        }


class SegmentationTask(DenseTask):
    """Objectness and instance boundaries: what is a thing and where one ends, not which thing it is."""

    outputs = {"object": 1, "boundary": 1}
    activation = "sigmoid"
    needs = ("instance_BHW",)
    headline = "object_iou"
    score_definition = (
        "intersection over union (%) of the cells called object (p > 0.5) and the cells that objects cover by more "
        "than half; higher is better"
    )

    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        instance_BHW = targets["instance_BHW"]
        boundary_B1HW = F.adaptive_max_pool2d(_changes(instance_BHW)[:, None], cells_hw)
        return torch.cat([_object_share(instance_BHW, cells_hw), boundary_B1HW], dim=1)

    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(map_BCHW, target_BCHW)

    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        said_BHW, true_BHW = map_BCHW[:, 0] > 0, target_BCHW[:, 0] > 0.5
        return {
            self.headline: (100 * (said_BHW & true_BHW).sum(), (said_BHW | true_BHW).sum()),
            "boundary_f1": _f1(map_BCHW[:, 1] > 0, target_BCHW[:, 1] > 0.5),
        }


class EdgeTask(DenseTask):
    """Whether a depth, normal or object edge runs through a cell."""

    outputs = {"edge": 1}
    activation = "sigmoid"
    needs = ("edges_BHW",)
    headline = "edge_f1"
    score_definition = (
        "F1 (%) of the cells called edge (p > 0.5) against the cells that hold an edge pixel; higher is better"
    )

    def target(self, targets: Targets, cells_hw: tuple[int, int]) -> Tensor:
        return F.adaptive_max_pool2d((targets["edges_BHW"] > 0).float()[:, None], cells_hw)

    def loss(self, map_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(map_BCHW, target_BCHW)

    def scores(self, map_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Ratio]:
        return {self.headline: _f1(map_BCHW > 0, target_BCHW > 0.5)}


def _to_cells(map_BCHW: Tensor, cells_hw: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(map_BCHW, cells_hw)


def _object_share(instance_BHW: Tensor, cells_hw: tuple[int, int]) -> Tensor:
    return _to_cells((instance_BHW > 0).float()[:, None], cells_hw)


def _class_shares(classes_BHW: Tensor, num: int, cells_hw: tuple[int, int]) -> Tensor:
    """Return the share of each cell's pixels per class; -1 (background) becomes the last class."""
    index_BHW = torch.where(classes_BHW < 0, num, classes_BHW).long()
    one_hot_BCHW = torch.zeros(len(index_BHW), num + 1, *index_BHW.shape[1:]).scatter_(1, index_BHW[:, None], 1.0)
    return _to_cells(one_hot_BCHW, cells_hw)


def _changes(instance_BHW: Tensor) -> Tensor:
    """Return 1.0 where the instance differs from the pixel to the right or below, and 0.0 elsewhere."""
    change_BHW = torch.zeros(instance_BHW.shape)
    change_BHW[:, :, :-1] += instance_BHW[:, :, 1:] != instance_BHW[:, :, :-1]
    change_BHW[:, :-1] += instance_BHW[:, 1:] != instance_BHW[:, :-1]
    return change_BHW.clamp(max=1)


def _f1(said: Tensor, true: Tensor) -> Ratio:
    return 200 * (said & true).sum(), said.sum() + true.sum()
