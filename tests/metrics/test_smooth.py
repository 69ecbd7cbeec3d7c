"""NLL per token and slots of dense captions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.metrics import SlotAccuracy, TokenNLL


def test_nll_is_a_mean_over_tokens() -> None:
    metric = TokenNLL()
    metric.update(torch.tensor([4.0, 1.0]), torch.tensor([8, 1]), ["dense", "vqa"])
    metric.update(torch.tensor([2.0]), torch.tensor([1]), ["vqa"])
    assert metric.compute() == pytest.approx({"nll": 7 / 10, "kind/dense": 0.5, "kind/vqa": 1.5})


def test_nll_of_a_uniform_guess_is_log_of_the_vocabulary() -> None:
    logits_MV, labels_M = torch.zeros(6, 50), torch.arange(6)
    nll_M = torch.nn.functional.cross_entropy(logits_MV, labels_M, reduction="none")
    metric = TokenNLL()
    metric.update(nll_M, torch.ones(6), ["dense"] * 6)
    assert metric.compute()["nll"] == pytest.approx(math.log(50))


def test_kind_without_a_token_is_left_out() -> None:
    metric = TokenNLL()
    metric.update(torch.tensor([0.0, 3.0]), torch.tensor([0, 2]), ["empty", "vqa"])
    assert metric.compute() == {"nll": 1.5, "kind/vqa": 1.5}


def test_slots_by_hand() -> None:
    metric = SlotAccuracy()
    metric.update(
        ["small red cube near large blue cube far", "Medium green sphere"],
        ["small red cube far large blue sphere far", "medium green sphere middle"],
    )
    # 3 objects: sizes 3/3, colours 3/3, shapes 2/3, distances 1/3.
    expected = {"accuracy": 9 / 12, "exact": 0.0}
    expected |= {"slot/size": 1.0, "slot/colour": 1.0, "slot/shape": 2 / 3, "slot/distance": 1 / 3}
    assert metric.compute() == pytest.approx(expected)


def test_slots_of_token_ids() -> None:
    metric = SlotAccuracy(slots=("colour", "shape"))
    metric.update([[5, 6, 7, 9], [5, 6, 7]], [[5, 6, 7, 8], [5, 6]])
    # The second names a surplus object: its slots are right, but it is not exact.
    assert metric.compute() == pytest.approx({"accuracy": 5 / 6, "exact": 0.0, "slot/colour": 1.0, "slot/shape": 2 / 3})


def test_empty_prediction_has_no_slot_right() -> None:
    metric = SlotAccuracy()
    metric.update([""], ["small red cube far"])
    assert metric.compute()["accuracy"] == 0


@pytest.mark.parametrize("reference", ["", "small red cube"])
def test_reference_must_fill_its_slots(reference: str) -> None:
    with pytest.raises(ValueError, match="4 words per object"):
        SlotAccuracy().update(["small red cube far"], [reference])
