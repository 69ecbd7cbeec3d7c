"""Which images a model is said to know."""

from __future__ import annotations

from typing import Any

import pytest

from visexpert.report.world import known_images, training_sets, warning_for

TABLETOP = {"class_path": "visexpert.tabletop.TabletopData", "init_args": {"num_train": 8}}
MIXED = {
    "class_path": "visexpert.data.MixedData",
    "init_args": {
        "sources": {
            "captions": {"class_path": "visexpert.data.COCOCaptions"},
            "questions": {"class_path": "visexpert.data.VQAv2"},
            "nocaps": {"class_path": "visexpert.data.NoCaps"},
        },
        "train": {"captions": 1.0, "questions": None},
    },
}


@pytest.mark.parametrize(
    ("data", "sets"),
    [
        (TABLETOP, ("TabletopData",)),
        ({"class_path": "visexpert.data.VSR"}, ("VSR",)),
        (MIXED, ("COCOCaptions", "VQAv2")),  # NoCaps is for tests only
        ({**MIXED, "init_args": {**MIXED["init_args"], "train": None}}, ("COCOCaptions", "VQAv2", "NoCaps")),  # type: ignore[dict-item]
        (None, ()),
        ({"num_train": 8}, ()),
    ],
)
def test_data_sets_are_those_that_the_run_trains_on(data: Any, sets: tuple[str, ...]) -> None:
    assert training_sets({"data": data}) == sets


def test_a_model_of_rendered_scenes_is_told_from_one_of_photos() -> None:
    assert "only Tabletop's rendered scenes" in warning_for(["TabletopData"])
    both = warning_for(["COCOCaptions", "TabletopData"])
    assert "COCOCaptions and Tabletop's rendered scenes" in both and "only" not in both
    assert warning_for([]) == "" and known_images(["VSR", "VQAv2"]) == "VSR and VQAv2"
