"""A run's folder: what a fit, a continued fit and a test leave in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from tests.callbacks.tiny import TinyModule, loader, trainer
from visexpert.callbacks import RunFolder, RunLogger, SaveRunConfig
from visexpert.callbacks.run_folder import METRICS_VERSION, data_identity, git_commit, metrics_table, tokenizer_identity
from visexpert.errors import ConfigError
from visexpert.report import read_metrics
from visexpert.tabletop.texts import tabletop_tokenizer


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _fit(folder: Path, *, max_epochs: int = 1, ckpt_path: str | None = None) -> TinyModule:
    module = TinyModule()
    callbacks = [RunFolder(), ModelCheckpoint(save_last=True)]
    fitted = trainer(
        logger=RunLogger(str(folder)), callbacks=callbacks, max_epochs=max_epochs, enable_checkpointing=True
    )
    fitted.fit(module, loader(), loader(batches=1), ckpt_path=ckpt_path, weights_only=True)
    return module


def _test(folder: Path) -> None:
    trainer(logger=RunLogger(str(folder)), callbacks=[RunFolder()]).test(TinyModule(), loader(), verbose=False)


def test_a_fit_leaves_the_files_of_the_design(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = _fit(tmp_path)
    assert {"metrics.csv", "metrics.json", "environment.json", "checkpoints"} <= {p.name for p in tmp_path.iterdir()}
    metrics = _read(tmp_path / "metrics.json")
    with torch.no_grad():
        expected = float(module._loss(next(iter(loader(batches=1)))))
    assert metrics["val/loss"] == pytest.approx(expected)
    assert "train/loss" in metrics
    out = capsys.readouterr().out
    assert [name for name in ("train ", "val ") if f"│ {name}" in out] == ["train ", "val "]
    assert f"{metrics['val/loss']:.5g}" in out
    assert out.endswith(f"These metrics are in {tmp_path / 'metrics.json'}\n")


def test_the_environment_can_be_rebuilt_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    _fit(tmp_path)
    environment = _read(tmp_path / "environment.json")["fit"]
    assert environment["seed"] == 17
    assert environment["versions"]["torch"] == version("torch")
    assert environment["command"] == sys.argv
    assert environment["machine"]["cores"] >= 1


def test_a_test_adds_its_scores_and_a_new_fit_drops_them(tmp_path: Path) -> None:
    _fit(tmp_path)
    fitted = _read(tmp_path / "metrics.json")
    _test(tmp_path)
    both = _read(tmp_path / "metrics.json")
    assert both == {**both, **fitted}
    assert both["test/vqa/accuracy"] == 0.25
    assert set(_read(tmp_path / "environment.json")) == {"fit", "test"}
    _fit(tmp_path)
    assert "test/vqa/accuracy" not in _read(tmp_path / "metrics.json")
    assert _read(tmp_path / "metrics.1.json") == both


def test_the_whole_curve_is_on_the_disk_when_the_fit_ends(tmp_path: Path) -> None:
    class Reader(Callback):
        steps: list[int] = []

        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.steps = read_metrics(tmp_path / "metrics.csv")["train/loss"][0].tolist()

    reader = Reader()
    trainer(logger=RunLogger(str(tmp_path)), callbacks=[reader, RunFolder()]).fit(TinyModule(), loader())
    assert reader.steps == list(range(8))


def test_testing_keeps_the_training_curve(tmp_path: Path) -> None:
    _fit(tmp_path)
    before = read_metrics(tmp_path / "metrics.csv")["train/loss"]
    _test(tmp_path)
    after = read_metrics(tmp_path / "metrics.csv")
    assert after["train/loss"][1].tolist() == before[1].tolist()
    assert after["test/vqa/accuracy"][1].tolist() == [0.25]


def test_a_continued_fit_goes_on_in_the_same_curve(tmp_path: Path) -> None:
    _fit(tmp_path, max_epochs=1)
    first = read_metrics(tmp_path / "metrics.csv")["train/loss"]
    _fit(tmp_path, max_epochs=2, ckpt_path="last")
    steps, values = read_metrics(tmp_path / "metrics.csv")["train/loss"]
    assert steps.tolist() == list(range(8))
    assert values[:4].tolist() == first[1].tolist()
    assert not (tmp_path / "metrics.1.csv").exists()


def test_a_fresh_fit_starts_a_new_curve_and_keeps_the_old(tmp_path: Path) -> None:
    _fit(tmp_path, max_epochs=2)
    _fit(tmp_path, max_epochs=1)
    assert len(read_metrics(tmp_path / "metrics.csv")["train/loss"][0]) == 4
    assert len(read_metrics(tmp_path / "metrics.1.csv")["train/loss"][0]) == 8


def _cli(folder: Path, *arguments: str, callbacks: Sequence[Callback] = ()) -> None:
    logger = {"class_path": "visexpert.callbacks.RunLogger", "init_args": {"folder": str(folder)}}
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    cli = LightningCLI(
        TinyModule,
        run=False,
        args=list(arguments),
        save_config_callback=SaveRunConfig,
        trainer_defaults={
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": logger,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
            **quiet,
        },
    )
    cli.trainer.fit(cli.model, loader())
    cli.trainer.test(cli.model, loader(), verbose=False)


def test_the_configuration_is_saved_and_an_earlier_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["visexpert"])
    _cli(tmp_path, "--seed_everything=1")
    _cli(tmp_path, "--seed_everything=1")
    assert sorted(path.name for path in tmp_path.glob("config*")) == ["config.yaml"]
    _cli(tmp_path, "--seed_everything=2")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert saved["seed_everything"] == 2
    assert saved["trainer"]["logger"]["init_args"]["folder"] == str(tmp_path)
    assert yaml.safe_load((tmp_path / "config.1.yaml").read_text(encoding="utf-8"))["seed_everything"] == 1


class Refuses(Callback):
    """Refuses a fit after the configuration was saved, as a checkpoint of other data does."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ConfigError("no")


def test_a_fit_refused_before_its_first_step_leaves_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["visexpert"])
    _cli(tmp_path, "--seed_everything=1")
    before = (tmp_path / "config.yaml").read_bytes()
    for seed in (1, 2):
        with pytest.raises(ConfigError):
            _cli(tmp_path, f"--seed_everything={seed}", callbacks=[Refuses()])
        assert {path.name: path.read_bytes() for path in tmp_path.glob("config*")} == {"config.yaml": before}


def test_the_commit_is_that_of_the_repository_and_tells_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "module.py"
    file.write_text("a = 1\n", encoding="utf-8")
    git("init", "-q")
    assert git_commit(file) is None  # not tracked: an environment inside somebody else's repository
    git("add", "module.py")
    git("commit", "-q", "-m", "one")
    assert git_commit(file) == git("rev-parse", "HEAD")
    file.write_text("a = 2\n", encoding="utf-8")
    assert git_commit(file) == git("rev-parse", "HEAD") + "-dirty"


def test_the_table_groups_by_the_first_part_of_the_name() -> None:
    table = metrics_table({"val/loss": 0.5, "test/vqa/accuracy": 0.25, "test/nll": None})
    names, values = (list(column.cells) for column in table.columns)
    assert names == ["[bold]test[/bold]", "  nll", "  vqa/accuracy", "[bold]val[/bold]", "  loss"]
    assert values == ["", "not finite", "0.25", "", "0.5"]


def test_the_environment_says_how_a_stage_ended(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(_read(tmp_path / "environment.json")["fit"]["outcome"])
            raise RuntimeError("out of\nmemory")

    seen: list[str] = []
    with pytest.raises(RuntimeError):
        trainer(logger=RunLogger(str(tmp_path)), callbacks=[RunFolder(), Fails()]).fit(TinyModule(), loader())
    entry = _read(tmp_path / "environment.json")["fit"]
    assert seen == ["running"]
    assert (entry["outcome"], entry["error"]) == ("failed", "RuntimeError: out of")
    assert entry["ended"] >= entry["time"]
    _fit(tmp_path)
    entry = _read(tmp_path / "environment.json")["fit"]
    assert entry["outcome"] == "finished" and "error" not in entry


def test_a_phase_that_fails_later_leaves_a_finished_stage_finished(tmp_path: Path) -> None:
    class FailsAfterwards(Callback):
        def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            raise RuntimeError("phase")

    with pytest.raises(RuntimeError):
        trainer(logger=RunLogger(str(tmp_path)), callbacks=[RunFolder(), FailsAfterwards()]).test(
            TinyModule(), loader(), verbose=False
        )
    assert _read(tmp_path / "environment.json")["test"]["outcome"] == "finished"


def test_the_environment_tells_data_tokenizer_and_metrics_apart(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        tokenizer = tabletop_tokenizer()

        def train_dataloader(self) -> Any:
            return loader()

        def image_sources(self) -> dict[str, SimpleNamespace]:
            return {"train": SimpleNamespace(fingerprint="abc")}

    trainer(logger=RunLogger(str(tmp_path)), callbacks=[RunFolder()]).fit(TinyModule(), datamodule=Data())
    entry = _read(tmp_path / "environment.json")["fit"]
    assert entry["data"] == {"class": "Data", "images": {"train": "abc"}}
    assert entry["metrics_version"] == METRICS_VERSION and entry["processes"] == 1
    again, other = tabletop_tokenizer(), tabletop_tokenizer()
    again(["one", "one two"], padding=True, return_tensors="pt")  # padding is a habit, not an identity
    other.add_tokens(["unheard-of"])
    assert entry["tokenizer"] == tokenizer_identity(again) != tokenizer_identity(other)
    assert tokenizer_identity(None) is None and data_identity(None) is None


def test_the_table_says_what_generated_scores_stand_on() -> None:
    metrics = {"test/caption/cider": 1.25, "test/caption/images": 2.0, "test/caption/images_of": 5.0, "test/nll": 0.5}
    table = metrics_table(metrics)
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert ("  caption/cider", "1.25", "2 of 5 images") in rows and ("  nll", "0.5", "") in rows
    assert not any("images_of" in str(row) for row in rows)
