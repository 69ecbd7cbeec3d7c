"""What may not be compared, and what is not on equal terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.compare.made import make_run
from visexpert.errors import ConfigError
from visexpert.report.compare.record import read_run
from visexpert.report.compare.scores import with_costs
from visexpert.report.compare.terms import mismatches, refuse_mixed, unequal_terms, uneven_variants
from visexpert.report.compare.variants import Variant


def _pair(folder: Path, **changes: Any) -> list[Variant]:
    made = [make_run(folder / "a"), make_run(folder / "b", **changes)]
    return [Variant(path.name, (with_costs(read_run(path)),)) for path in made]


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"data": {"seed": 1}}, "data", "data.seed"),
        ({"data": {"tokenizer": "other"}, "test": {"tokenizer": "xyz"}}, None, None),
        ({"model": {"evaluation": {"caption_images": 4}}}, "evaluation", "model.evaluation.caption_images"),
        ({"data": {"train_fraction": 0.5}}, None, None),
        ({"model": {"top_k": 2}}, None, None),
    ],
)
def test_other_worlds_and_evaluations_are_found(
    tmp_path: Path, changes: dict[str, Any], kind: str | None, key: str | None
) -> None:
    found = mismatches(_pair(tmp_path, **changes), split="test")
    assert [(one.kind, one.key) for one in found] == ([] if kind is None else [(kind, key)])


@pytest.mark.parametrize(
    ("fact", "kind"),
    [
        ({"tokenizer": "b"}, "tokenizer"),
        ({"metrics_version": 2}, "metrics"),
        ({"data": {"images": {"test": "b"}}}, "data"),
    ],
)
def test_recorded_identities_are_compared_and_missing_ones_are_not(
    tmp_path: Path, fact: dict[str, Any], kind: str
) -> None:
    known = {"tokenizer": "a", "metrics_version": 1, "data": {"images": {"test": "a", "train": "c"}}}
    one, other, old = (
        Variant(name, (read_run(make_run(tmp_path / name, test=test)),))
        for name, test in (("one", known), ("other", {**known, **fact}), ("old", {}))
    )
    assert [each.kind for each in mismatches([one, other, old], split="test")] == [kind]
    assert mismatches([one, old], split="test") == []


def test_the_refusal_names_what_differs_and_who_has_it(tmp_path: Path) -> None:
    refuse_mixed([])
    with pytest.raises(ConfigError) as caught:
        refuse_mixed(mismatches(_pair(tmp_path, data={"seed": 1, "num_test": 8}), split="test"))
    assert str(caught.value) == (
        "These runs cannot be compared: they differ in data: data.num_test is 16 in 'a' and 8 in 'b'; data: data.seed "
        "is 0 in 'a' and 1 in 'b'; leave some out, or set allow_mixed to see them side by side anyway."
    )


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"model": {"language": {"class_path": "x.PrefixLM", "init_args": {}}}}, ["decoder"]),
        ({"trainer": {"max_steps": 20}, "metrics": {"cost/steps": 20.0}}, ["images seen", "schedule"]),
        ({"trainer": {"callbacks": [{"class_path": "x.TrainingBudget", "init_args": {"gflop": 5}}]}}, ["schedule"]),
        ({"data": {"batch_size": 8}}, ["images seen", "batch"]),
        ({"data": {"train_fraction": 0.5}}, ["training data"]),
        ({"metrics": {"cost/train_images": 39.0}}, ["images seen"]),
        ({"test": {"machine": {"cpu": "B", "cores": 2}}}, ["machine, for times"]),
    ],
)
def test_unequal_terms_are_named(tmp_path: Path, changes: dict[str, Any], kinds: list[str]) -> None:
    assert [one.kind for one in unequal_terms(_pair(tmp_path, **changes))] == kinds


def test_seeds_of_unlike_settings_are_named(tmp_path: Path) -> None:
    runs = tuple(read_run(make_run(tmp_path / str(k), seed=k, model={"top_k": k % 2})) for k in range(3))
    found = uneven_variants([Variant("v", runs)])
    assert [(one.kind, one.key, one.holders) for one in found] == [
        ("v", "model.top_k", {"0": ("seed 0", "seed 2"), "1": ("seed 1",)})
    ]


def test_captions_of_other_numbers_of_images_are_not_compared(tmp_path: Path) -> None:
    counts = [{"test/caption/images": float(images), "test/caption/images_of": 5.0} for images in (2, 5)]
    made = [make_run(tmp_path / str(number), metrics=each) for number, each in enumerate(counts)]
    runs = [Variant(path.name, (read_run(path),)) for path in made]
    found = mismatches(runs, split="test")
    assert [(one.kind, one.key) for one in found] == [("evaluation", "test/caption/images")]


@pytest.mark.parametrize(("scores", "kinds"), [({}, []), ({"test/knn/student": 0.5}, ["model.evaluation.knn_images"])])
def test_numbers_of_neighbors_matter_where_there_are_scores_of_them(
    tmp_path: Path, scores: dict[str, float], kinds: list[str]
) -> None:
    made = [
        make_run(tmp_path / name, metrics=scores, model={"evaluation": {"caption_images": 8, "knn_images": images}})
        for name, images in (("a", 4), ("b", 8))
    ]
    found = mismatches([Variant(path.name, (read_run(path),)) for path in made], split="test")
    assert [one.key for one in found] == kinds
