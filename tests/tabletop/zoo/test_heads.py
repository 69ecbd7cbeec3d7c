"""Dense tasks against truths that are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.tabletop.zoo.dense import add_ratios, divide
from visexpert.tabletop.zoo.heads import (
    AttributeTask,
    DenseTask,
    DepthTask,
    EdgeTask,
    NormalsTask,
    Ratio,
    SegmentationTask,
)


def scores_of(task: DenseTask, map_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> dict[str, float]:
    totals: dict[str, Ratio] = {}
    add_ratios(totals, task.scores(map_BCHW, target_BCHW))
    return divide(totals)


def one_object() -> dict[str, torch.Tensor]:
    """An 8x8 image whose left half is one object (instance 1, blue = 1, cube = 1, shiny = 1)."""
    instance_BHW = torch.zeros(1, 8, 8, dtype=torch.int64)
    instance_BHW[:, :, :4] = 1
    classes = torch.where(instance_BHW > 0, 1, -1)
    return {
        "instance_BHW": instance_BHW,
        "colour_BHW": classes,
        "shape_BHW": classes,
        "material_BHW": classes,
        "depth_BHW": torch.where(instance_BHW > 0, 5.0, 10.0),
        "normals_B3HW": torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8),
        "edges_BHW": torch.zeros(1, 8, 8),
    }


def test_attributes__shares_perfect_map_and_loss_at_the_optimum() -> None:
    task, targets = AttributeTask(), one_object()
    truth_BCHW = task.target(targets, (4, 4))
    assert truth_BCHW.shape == (1, 9 + 4 + 3, 4, 4)
    torch.testing.assert_close(truth_BCHW[0, 1], torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4))
    torch.testing.assert_close(truth_BCHW[0, 8], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))
    # A cell that is half object has half a share of each; its best loss is the entropy log 2, three times.
    half_BCHW = task.target(targets, (1, 1))
    best = task.loss(half_BCHW.clamp(min=1e-9).log(), half_BCHW)
    assert best.item() == pytest.approx(3 * math.log(2) * (1 + 3 * 0.5), rel=1e-4)
    assert scores_of(task, truth_BCHW * 10, truth_BCHW)["attribute_accuracy"] == 100
    wrong_BCHW = truth_BCHW.clone()
    wrong_BCHW[:, 0] = 20  # red instead of blue; shape and material stay right
    scores = scores_of(task, wrong_BCHW, truth_BCHW)
    assert scores["colour_accuracy"] == 0
    assert scores["attribute_accuracy"] == pytest.approx(200 / 3)


def test_depth__log_of_the_cell_and_error_in_objects_only() -> None:
    task = DepthTask(center=0.0)
    truth_BCHW = task.target(one_object(), (2, 2))
    torch.testing.assert_close(truth_BCHW[0, 0, 0], torch.tensor([math.log(5), math.log(10)]))
    torch.testing.assert_close(truth_BCHW[0, 1, 0], torch.tensor([1.0, 0.0]))
    assert task.loss(truth_BCHW[:, :1], truth_BCHW).item() == 0
    off_BCHW = truth_BCHW[:, :1].clone()
    off_BCHW[..., 1] += 0.5  # the table only
    scores = scores_of(task, off_BCHW, truth_BCHW)
    assert scores["object_error"] == 0
    assert scores["error"] == pytest.approx(25)


def test_normals__cosine_whatever_the_length() -> None:
    task = NormalsTask()
    truth_BCHW = task.target(one_object(), (2, 2))
    assert task.loss(3 * truth_BCHW[:, :3], truth_BCHW).item() == pytest.approx(0, abs=1e-6)
    sideways = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert scores_of(task, sideways, truth_BCHW)["object_error"] == pytest.approx(100)


def test_segmentation__boundary_where_instances_meet() -> None:
    task = SegmentationTask()
    truth_BCHW = task.target(one_object(), (4, 4))
    torch.testing.assert_close(truth_BCHW[0, 1, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))  # pixel 3 differs from pixel 4
    everything = torch.ones(1, 2, 4, 4)
    scores = scores_of(task, everything, truth_BCHW)
    assert scores["object_iou"] == 50
    assert scores["boundary_f1"] == pytest.approx(100 * 2 * 4 / (16 + 4))


def test_edges__any_edge_pixel_makes_a_cell() -> None:
    task, targets = EdgeTask(), one_object()
    targets["edges_BHW"][0, 0, 0] = 1
    truth_BCHW = task.target(targets, (4, 4))
    assert truth_BCHW.sum() == 1 and truth_BCHW[0, 0, 0, 0] == 1
    assert scores_of(task, truth_BCHW - 0.5, truth_BCHW)["edge_f1"] == 100
    assert "edge_f1" not in scores_of(task, torch.full((1, 1, 4, 4), -1.0), torch.zeros(1, 1, 4, 4))


def test_ratios__are_divided_after_summing() -> None:
    totals: dict[str, Ratio] = {}
    add_ratios(totals, {"x": (torch.tensor(1), torch.tensor(1))})
    add_ratios(totals, {"x": (torch.tensor(0), torch.tensor(3))})
    assert divide(totals) == {"x": 0.25}
