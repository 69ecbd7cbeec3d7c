"""Runs into variants: by name, by folder, by settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.compare.made import make_run
from visexpert.errors import ConfigError
from visexpert.report.compare.record import read_run
from visexpert.report.compare.variants import Variant, group_runs


def _grouped(*folders: Path, named: dict[Path, str] | None = None) -> dict[str, list[int | None]]:
    return {v.name: list(v.seeds) for v in group_runs([read_run(folder) for folder in folders], named)}


def test_variant_and_seed_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / f"seed{seed}", seed=seed) for name in ("tove", "clip") for seed in (1, 0)]
    assert _grouped(*folders) == {"tove": [0, 1], "clip": [0, 1]}


def test_names_are_as_long_as_needed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / "seed0") for name in ("grounded/clip", "scratch/clip", "grounded/tove")]
    folders.append(make_run(tmp_path / "grounded" / "tove" / "seed0" / "merged"))
    assert list(_grouped(*folders)) == ["grounded/clip", "scratch/clip", "tove", "tove/merged"]


def test_runs_of_equal_settings_are_seeds_of_one_variant(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"clip-{seed}", seed=seed) for seed in (0, 1)]
    folders += [make_run(tmp_path / "other", model={"top_k": 1})]
    assert _grouped(*folders) == {"clip": [0, 1], "other": [0]}


def test_settings_name_what_folders_do_not(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one", seed=0), make_run(tmp_path / "two", seed=1)]
    folders += [
        make_run(tmp_path / "three", model={"top_k": 1}),
        make_run(tmp_path / "four", seed=1, model={"top_k": 1}),
    ]
    assert _grouped(*folders) == {"top_k=null": [0, 1], "top_k=1": [0, 1]}


@pytest.mark.parametrize("facts", ["detachment.json", "merge.json"])
def test_a_phase_is_a_variant_of_its_own_whatever_it_changed(tmp_path: Path, facts: str) -> None:
    run = make_run(tmp_path / "tove")
    phase = make_run(run / "phase")  # as after a detachment that kept every expert
    (phase / facts).write_text('{"settings": {"keep": 5}}', encoding="utf-8")
    assert _grouped(run, phase) == {"tove": [0], "phase": [0]}


def test_a_given_name_goes_before_all(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a" / "seed0"), make_run(tmp_path / "b" / "seed1", seed=1, model={"top_k": 1})
    assert _grouped(a, b, named={a: "mine", b: "mine"}) == {"mine": [0, 1]}


def test_a_seed_comes_once(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a" / "seed0"), make_run(tmp_path / "a" / "seed1", seed=0)
    with pytest.raises(ConfigError, match="are both 'a' with seed 0; .*separate names by a group"):
        _grouped(a, b)


def test_a_variant_gives_its_figures_by_seed(tmp_path: Path) -> None:
    runs = tuple(read_run(make_run(tmp_path / str(seed), seed=seed, vqa=0.5 + seed / 10)) for seed in (0, 1))
    variant = Variant("v", runs)
    assert variant.by_seed("test/vqa/accuracy") == {0: 0.5, 1: 0.6}
    assert variant.values("test/absent") == []
