"""Merging as a phase: a run folder of its own, resumable, on a finished run or at the end of a fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from visexpert.callbacks import KnowledgeMerging
from visexpert.callbacks.phase import PhaseSettings, write_checkpoint
from visexpert.cli import main
from visexpert.commands.export_mole import sources_of
from visexpert.errors import ConfigError, DataError, WeightsError
from visexpert.methods import MergeSettings, MergingOptimizer, ToVE
from visexpert.runs import load_run
from visexpert.vision import equipped_blocks

SMOKE = Path(__file__).parents[2] / "configs" / "tove" / "smoke.yaml"
MERGE = ["--steps", "6", "--optimizer.warmup_steps", "2", "--eval_every", "3", "--checkpoint_every", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished smoke run; tests copy it."""
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder / "cache"))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        main(["fit", "--config", str(SMOKE), "--run", str(folder / "run")])
        yield folder / "run"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


@pytest.fixture(scope="module")
def once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, merged; tests copy it."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("once") / "run"))
    main(["merge", str(folder), *MERGE])
    return folder


@pytest.fixture
def merged_run(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "merged_run"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


class DieAt(Callback):
    """Ends the process's work at a step of the merge."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise MemoryError("killed")


def test_a_merged_run_is_a_run_of_a_plain_clip(once: Path) -> None:
    run, merged = once, once / "merged"
    names = {path.name for path in merged.iterdir()}
    assert {"config.yaml", "metrics.csv", "metrics.json", "merge.json", "environment.json", "checkpoints"} <= names
    assert [path.name for path in (merged / "checkpoints").iterdir()] == ["last.ckpt"]
    saved, teacher = load_run(merged), load_run(run)
    assert isinstance(saved.model, ToVE) and saved.model.hub.names == () and saved.steps == 8 + 6
    before, after = (model.clip.state_dict() for model in (teacher.model, saved.model))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not any(key.startswith(("hub.", "adapters.", "gate.")) for key in weights(merged))
    facts = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
    assert facts["experts"].keys() == {"semantic", "depth"} and facts["teacher_steps"] == 8
    metrics = json.loads((merged / "metrics.json").read_text(encoding="utf-8"))
    whole = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["cost/gflop_vision"] < whole["cost/gflop_vision"]
    assert metrics["cost/steps"] == 14 and metrics["cost/train_seconds"] > 0
    assert "val/nmse" in metrics and "train/token_loss" in metrics


def test_scoring_it_again_gives_the_same_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["merge", str(run), *MERGE])
    told, path = capsys.readouterr().out, run / "merged" / "metrics.json"
    whole, merged = (json.loads(each.read_text(encoding="utf-8")) for each in (run / "metrics.json", path))
    assert re.search(r"train/nmse [\d.e-]+ at the start, [\d.e-]+ at the end", told)
    assert f"test/nll/nll {whole['test/nll/nll']:.4g} before, {merged['test/nll/nll']:.4g} after" in told
    assert f"Next: visexpert export {run} --out {run / 'merged-encoder'}" in told
    before = json.loads(path.read_text(encoding="utf-8"))
    main(["test", str(run / "merged")])
    after = json.loads(path.read_text(encoding="utf-8"))
    scores = [key for key in before if key.startswith("test/")]
    assert scores and all(after[key] == pytest.approx(before[key], rel=1e-5) for key in scores)


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_killed_merge_goes_on_where_it_was(run: Path, once: Path, tmp_path: Path, adaptation: Any) -> None:
    whole = once
    if adaptation != MergeSettings().adaptation:
        whole = Path(shutil.copytree(run, tmp_path / "whole"))
        main(["merge", str(whole), *MERGE, "--merging.adaptation", adaptation])
    settings = PhaseSettings(accelerator="cpu", log_every_n_steps=1)
    original = PhaseSettings.trainer

    def deadly(self: PhaseSettings, *args: Any, **kwargs: Any) -> Trainer:
        trainer = original(self, *args, **kwargs)
        trainer.callbacks.insert(0, DieAt(5))  # type: ignore[attr-defined]
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseSettings, "trainer", deadly)
        saved = load_run(run)
        how, rates = MergeSettings(adaptation=adaptation), MergingOptimizer(warmup_steps=2)
        phase = KnowledgeMerging(steps=6, merging=how, optimizer=rates, eval_every=3, checkpoint_every=2)
        assert isinstance(saved.model, ToVE)
        with pytest.raises(MemoryError):
            phase.apply(saved.model, saved.data, run, settings)
    assert [path.name for path in (run / "merged" / "checkpoints").iterdir()] == ["training.ckpt"]
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_run(run / "merged")  # nothing looks whole
    main(["merge", str(run), *MERGE, "--merging.adaptation", adaptation])
    expected, got = weights(whole / "merged"), weights(run / "merged")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_merge_into_mole_is_a_run_that_opens_and_is_scored_and_exported(run: Path, tmp_path: Path) -> None:
    student = ["--student", "{mole: {num_experts: 2, rank: 4}, balance_weight: 0.1}"]
    main(["merge", str(run), *MERGE, *student])
    merged = run / "merged"
    facts = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
    assert facts["student"]["mole"]["rank"] == 4 and facts["student"]["balance_weight"] == 0.1
    scores = json.loads((merged / "metrics.json").read_text(encoding="utf-8"))
    assert "train/balance_loss" in scores
    main(["test", str(merged)])
    again = json.loads((merged / "metrics.json").read_text(encoding="utf-8"))
    assert again["test/nll/nll"] == pytest.approx(scores["test/nll/nll"], rel=1e-5)
    saved = load_run(merged)
    assert isinstance(saved.model, ToVE) and saved.model.hub.names == ()
    blocks = equipped_blocks(saved.model.clip)
    assert blocks and all(mole.fc1_experts.num_experts == 2 for mole in blocks.values())
    state = weights(merged)
    assert all(torch.equal(value, state[f"clip.{key}"]) for key, value in saved.model.clip.state_dict().items())
    sources = sources_of(saved, ["visexpert", "hf"], layers=None, treatment=None, flatten=(1, 1e-4))
    assert "'rank': 4" in sources["hf"].origin["merge: student"]
    assert equipped_blocks(sources["visexpert"].clip) and not equipped_blocks(sources["hf"].clip)
    with pytest.raises(SystemExit):
        main(["merge", str(run), *MERGE])  # begun with another student
    with pytest.raises(SystemExit):
        main(["merge", str(run), *MERGE, "--name", "other", "--student.mole.rnak", "4"])
    assert not (run / "other").exists()


def test_a_finished_merge_is_kept_and_another_needs_another_name(merged_run: Path) -> None:
    run = merged_run
    stamp = (run / "merged" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    main(["merge", str(run), *MERGE])
    assert (run / "merged" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit):
        main(["merge", str(run), *MERGE, "--optimizer.lr", "0.5"])
    main(["merge", str(run), *MERGE, "--optimizer.lr", "0.5", "--name", "other"])
    assert (run / "other" / "metrics.json").is_file()


def test_it_is_a_second_phase_of_a_fit(run: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "merge.yaml"
    phase = {
        "class_path": "visexpert.callbacks.KnowledgeMerging",
        "init_args": {"steps": 4, "optimizer": {"warmup_steps": 1}},
    }
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [phase]}}), encoding="utf-8")
    folder = tmp_path / "fit"
    main(["fit", "--config", str(SMOKE), "--config", str(overlay), "--run", str(folder)])
    assert "test/nll/nll" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert load_run(folder / "merged").steps == 8 + 4
    assert "KnowledgeMerging" not in (folder / "merged" / "config.yaml").read_text(encoding="utf-8")
    main(["test", str(run), "--config", str(overlay)])  # and the same on a finished run
    expected, got = weights(folder / "merged"), weights(run / "merged")
    assert all(torch.allclose(expected[key], got[key], atol=1e-6) for key in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--distanse", "mse"], "no setting 'distanse'"),
        (["--merging.distance", "l1"], "l1"),
        (["--name", "../x"], "must be a plain folder name"),
    ],
)
def test_bad_settings_are_one_sentence(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["merge", str(run), *arguments])
    assert message in capsys.readouterr().err
    assert not (run / "merged").exists()


def test_folders_that_are_no_runs(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run: it has no config.yaml"):
        load_run(tmp_path)
    damaged = run / "checkpoints" / "last.ckpt"
    for other in damaged.parent.glob("step=*.ckpt"):  # else the newest of them is taken
        other.unlink()
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"last\.ckpt.*damaged"):
        load_run(run)
    damaged.unlink()
    with pytest.raises(ConfigError, match="has no checkpoint"):
        load_run(run)
    (run / "config.yaml").write_text("model: [", encoding="utf-8")
    damaged.touch()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(run)


def test_a_full_disk_leaves_no_half_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_run(run)

    def full(checkpoint: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(DataError, match="free the disk"):
        write_checkpoint(saved.model, run / "merged", steps=1)
    assert list((run / "merged" / "checkpoints").iterdir()) == []


def test_an_opened_run_has_the_random_encoders_of_its_seed(run: Path) -> None:
    first, second = load_run(run), load_run(run)
    state, again = first.model.state_dict(), second.model.state_dict()
    assert any(key.startswith("hub.") for key in state)
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_a_merge_of_other_weights_is_set_aside(merged_run: Path) -> None:
    run = merged_run
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {key: value + 0.1 for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)  # as if the run had been trained anew
    before = weights(run / "merged")
    main(["merge", str(run), *MERGE])
    assert (run / "merged.1" / "checkpoints" / "last.ckpt").is_file()
    after = weights(run / "merged")
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_tuning_need_not_see_the_test_images(run: Path) -> None:
    main(["merge", str(run), *MERGE, "--test", "false"])
    metrics = json.loads((run / "merged" / "metrics.json").read_text(encoding="utf-8"))
    assert "val/nmse" in metrics and not any(key.startswith("test/") for key in metrics)


def test_a_run_is_scored_though_the_run_that_it_started_from_is_gone(run: Path, tmp_path: Path) -> None:
    donor, second = tmp_path / "donor.ckpt", tmp_path / "second"
    shutil.copy(run / "checkpoints" / "last.ckpt", donor)
    main(["fit", "--config", str(SMOKE), "--run", str(second), f"--model.init_args.init_from={donor}"])
    before = json.loads((second / "metrics.json").read_text(encoding="utf-8"))
    donor.unlink()
    main(["test", str(second)])
    after = json.loads((second / "metrics.json").read_text(encoding="utf-8"))
    assert after["test/nll/nll"] == pytest.approx(before["test/nll/nll"], rel=1e-5)
    assert load_run(second).steps == 8


def test_null_steps_are_as_many_as_the_run_had(run: Path) -> None:
    main(["merge", str(run), "--steps", "null", "--optimizer.warmup_steps", "2", "--test", "false"])
    facts = json.loads((run / "merged" / "merge.json").read_text(encoding="utf-8"))
    assert facts["teacher_steps"] == 8 and facts["steps"] == 8
    assert load_run(run / "merged").steps == 16
