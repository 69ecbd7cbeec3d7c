"""The probe table: cell truth by hand, tokens that hold the answer, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from visexpert.tabletop.zoo.probe_table import ATTRIBUTES, CellTruth, cell_truth, encode_cells, probe, write_results
from visexpert.tabletop.zoo.ship import CARDS, PROBE_COLUMNS
from visexpert.types import Batch, ExpertTokens

SCENES = 40


def batch_of(instance_BHW: torch.Tensor, colour: int) -> Batch:
    classes = torch.where(instance_BHW > 0, colour, -1)
    B, H, W = instance_BHW.shape
    return Batch(
        images_BCHW=torch.zeros(B, 3, H, W, dtype=torch.uint8),
        index_B=torch.arange(B),
        split="val",
        targets={
            "instance_BHW": instance_BHW,
            "depth_BHW": torch.where(instance_BHW > 0, torch.e, torch.e**3),
            "normals_B3HW": torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(B, 3, H, W),
            **{f"{name}_BHW": classes for name in ATTRIBUTES},
        },
    )


def test_cell_truth__by_hand() -> None:
    instance_BHW = torch.zeros(1, 16, 16, dtype=torch.int64)
    instance_BHW[0, 0, :2] = 1  # half of the first cell: not more than half
    instance_BHW[0, 0:2, 2:4] = 2  # all of the second
    instance_BHW[0, 2, 2:4] = 2
    instance_BHW[0, 3, 3] = 2  # three quarters of the cell below
    truth = cell_truth([batch_of(instance_BHW, 1)])
    assert truth.object_N.nonzero().flatten().tolist() == [1, 9]
    torch.testing.assert_close(truth.depth_N[[0, 1, 9, 63]], torch.tensor([2.0, 1.0, 1.5, 3.0]))
    torch.testing.assert_close(truth.object_depth_N[[0, 1, 9]], torch.ones(3))
    assert truth.classes["colour"][[1, 9]].tolist() == [1, 1]
    torch.testing.assert_close(truth.normals_N3[5], torch.tensor([0.0, 1.0, 0.0]))


def test_probe__reads_what_the_tokens_hold_and_nothing_else() -> None:
    rows = SCENES * 64
    labels_N = torch.randint(0, 3, (rows,))
    truth = CellTruth(
        depth_N=torch.randn(rows),
        normals_N3=torch.randn(rows, 3),
        object_N=torch.rand(rows) < 0.5,
        object_depth_N=torch.randn(rows),
        classes=dict.fromkeys(ATTRIBUTES, labels_N),
    )
    one_hot_NC = torch.nn.functional.one_hot(labels_N, 3).float()
    tokens_NE = torch.cat([truth.depth_N[:, None], one_hot_NC], dim=1) @ torch.randn(4, 12)
    scores = probe(tokens_NE, truth, scenes=SCENES)
    assert set(scores) == set(PROBE_COLUMNS)
    assert scores["depth"] == pytest.approx(100, abs=0.1)
    assert scores["colour"] == 100
    assert abs(scores["object_depth"]) < 10 and abs(scores["normals"]) < 10


def test_encode_cells__resamples_to_the_common_grid() -> None:
    tokens_BSE = torch.rand(2, 256, 5)
    rows_NE = encode_cells(lambda _: ExpertTokens(tokens_BSE, (16, 16)), [batch_of(torch.zeros(2, 16, 16).long(), 0)])
    assert rows_NE.shape == (128, 5)
    torch.testing.assert_close(rows_NE[0], tokens_BSE[0, [0, 1, 16, 17]].mean(0))


def test_write_results__cards_and_page_hold_the_table(tmp_path: Path) -> None:
    facts = json.loads((CARDS / "depth.json").read_text(encoding="utf-8"))
    (tmp_path / "depth.json").write_text(json.dumps(facts), encoding="utf-8")
    row = {column: 10.0 + place for place, column in enumerate(PROBE_COLUMNS)}
    write_results({"depth": row}, tmp_path / "docs" / "zoo.md", scenes=7, cards=tmp_path)
    line = "| depth | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 | 15.0 | 16.0 |"
    assert line in (tmp_path / "depth.md").read_text(encoding="utf-8")
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert line in page and "7 held-out scenes" in page and f"object_error {facts['score']}" in page
