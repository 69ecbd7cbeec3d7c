"""How a run begins, is stopped, goes on and ends: its folder, signals and metrics, through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from visexpert import training
from visexpert.callbacks import RunFigures, predictions
from visexpert.cli import main
from visexpert.io.run_folder import OWN, PREVIOUS, SIDECAR, hold, holds_run
from visexpert.methods import Method, ToVE
from visexpert.methods.evaluation import decode, write_all
from visexpert.methods.step import FILE as NOT_FINITE
from visexpert.report import read_metrics
from visexpert.runs import load_run

SMOKE = Path(__file__).parents[1] / "configs" / "tove" / "smoke.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a run seed of this file's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        callbacks = [each for each in training.default_callbacks() if not isinstance(each, RunFigures)]  # slow to draw
        patch.setattr(training, "default_callbacks", lambda: [type(each)() for each in callbacks])
        yield folder


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(fit(folder))
    return folder


def fit(folder: Path, *more: str) -> list[str]:
    """The command of the smoke run, saved every fourth step, validated at steps 4 and 8."""
    quick = ["--model.init_args.evaluation.caption_images", "1", "--data.init_args.num_test", "8"]
    return ["fit", "--config", str(SMOKE), "--run", str(folder), "--checkpoint_every", "4", *quick, *more]


class Kill(BaseException):
    """Ends a process without a word to anyone, as far as a test can."""


class At(Callback):
    """Does something once, when a hook is called at a step of a fit, or in a test."""

    def __init__(self, hook: str, step: int, act: Callable[[], None]) -> None:
        self.done = False

        def react(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == step and not self.done:
                self.done = True
                act()

        setattr(self, hook, react)


def files_in_quickstart() -> list[str]:
    """The names in the first column of the quickstart's table of a run's folder."""
    text = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    table = text.partition("| file | what |\n|---|---|\n")[2].partition("\n\n")[0]
    return [name for row in table.splitlines() for name in re.findall("`([^`]+)`", row.split("|")[1])]


def test_the_quickstart_names_every_file_of_a_runs_folder(whole: Path) -> None:
    """What ``--overwrite`` knows as written by a run, and what lies in the folder of one."""
    told = files_in_quickstart()
    assert "metrics.csv" in told
    known = [*(name.replace("*.", ".") for name in OWN if "_ckpt_" not in name), f"{PREVIOUS}.1", ".lock"]
    assert [name for name in known if name not in told and f"{name}/" not in told] == []
    there = [path.name for path in whole.iterdir()]
    patterns = [name.rstrip("/") for name in told]
    assert [name for name in there if not any(fnmatch(name, each) for each in patterns)] == []


def killed() -> None:
    raise Kill


def sent(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def end_at(hook: str, step: int, act: Callable[[], None], command: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that is ended in a hook; what ended it."""
    callbacks = training.default_callbacks
    with monkeypatch.context() as patch, pytest.raises((SystemExit, Kill)) as ended:
        patch.setattr(training, "default_callbacks", lambda: [*callbacks(), At(hook, step, act)])
        main(command)
    return ended.value


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, Any]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert isinstance(checkpoint, dict)
    return checkpoint


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that the clock has no part in."""
    clock = ("per_s", "seconds", "wait", "cost/")
    return {name: value for name, value in metrics.items() if not any(part in name for part in clock)}


def assert_same_weights(whole: Path, continued: Path) -> None:
    first, second = weights(whole), weights(continued)
    assert first["global_step"] == second["global_step"] == 8
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


def assert_equal_runs(whole: Path, continued: Path) -> None:
    assert_same_weights(whole, continued)
    metrics, again = read(whole / "metrics.json"), read(continued / "metrics.json")
    assert metrics.keys() == again.keys()
    assert timeless(again) == timeless(metrics)
    curves, curves_again = read_metrics(whole / "metrics.csv"), read_metrics(continued / "metrics.csv")
    for name in ("train/loss", "val/nll/nll"):
        assert [part.tolist() for part in curves_again[name]] == [part.tolist() for part in curves[name]]


@pytest.mark.parametrize("hook", ["on_validation_start", "on_test_start"])
def test_a_run_killed_after_its_last_step_has_all_its_metrics_once_continued(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    assert isinstance(end_at(hook, 8, killed, fit(tmp_path), monkeypatch), Kill)
    main(fit(tmp_path, "--ckpt_path", "last"))
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize(
    ("signum", "code", "hook", "step"),
    [
        (signal.SIGTERM, 143, "on_train_batch_start", 5),  # inside a step
        (signal.SIGINT, 130, "on_validation_batch_start", 4),  # inside a validation in mid-run
        (signal.SIGTERM, 143, "on_train_batch_start", 7),  # inside the last step, before the last validation
    ],
)
def test_a_signal_saves_says_so_and_the_run_goes_on_to_the_same_end(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
    hook: str,
    step: int,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    ended = end_at(hook, step, sent(signum), fit(tmp_path, "--checkpoint_every", "100"), monkeypatch)
    assert isinstance(ended, SystemExit) and ended.code == code
    reached = step + 1 if "train" in hook else step  # the step under way is finished first
    assert weights(tmp_path)["global_step"] == reached
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("visexpert: ") and signal.Signals(signum).name in said
    assert f"step {reached}," in said and "last.ckpt" in said and "--ckpt_path last" in said
    entry = read(tmp_path / "environment.json")["fit"]
    assert (entry["outcome"], entry["signal"]) == ("interrupted", signal.Signals(signum).name)
    assert not (tmp_path / "metrics.json").exists()
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    main(fit(tmp_path, "--ckpt_path", "last", "--checkpoint_every", "100"))
    assert_equal_runs(whole, tmp_path)


def test_a_signal_in_the_test_leaves_a_finished_fit(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert end_at("on_test_start", 8, sent(signal.SIGTERM), fit(tmp_path), monkeypatch).code == 143
    assert "SIGTERM" in capsys.readouterr().err.strip().splitlines()[-1]
    stages = read(tmp_path / "environment.json")
    assert (stages["fit"]["outcome"], stages["test"]["outcome"]) == ("finished", "interrupted")
    main(fit(tmp_path, "--ckpt_path", "last"))
    assert "No step is left" in caplog.text and "trainer.max_steps is 8" in caplog.text
    assert_equal_runs(whole, tmp_path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that ends a command with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def contents(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_used_folder_is_refused_before_anything_is_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    said = refused(fit(whole), capsys)
    assert f"'{whole}'" in said and "--ckpt_path last" in said and "--overwrite" in said and "--run" in said
    assert "holds a finished run" in said
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "checkpoints" / "last.ckpt").touch()
    (unfinished / "environment.json").write_text('{"fit": {"outcome": "interrupted"}}', encoding="utf-8")
    said = refused(fit(unfinished), capsys)
    assert "holds an unfinished run" in said and "resume it with --ckpt_path last" in said
    elsewhere = tmp_path / "checkpoints" / "last.ckpt"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes())
    assert f"'{whole}'" in refused(fit(whole, "--ckpt_path", str(elsewhere)), capsys)  # another run's rows after these
    for start in (["--ckpt_path", "last"], ["--model.init_args.init_from", str(whole / "checkpoints" / "last.ckpt")]):
        assert "goes on from it" in refused(fit(whole, "--overwrite", *start), capsys)
    assert contents(whole) == before


def test_overwrite_keeps_the_earlier_run_whole_and_is_not_remembered(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_steps", "1", "--test_after_fit", "false"]
    main(fit(tmp_path, *short, "--overwrite"))  # nothing there yet
    first = weights(tmp_path)["state_dict"]
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge.json").write_text("{}", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    beside = {SIDECAR, NOT_FINITE}  # of its scores and its steps
    for name in beside:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with hold(tmp_path, "merged"):
        assert "merged" in refused(fit(tmp_path, *short, "--overwrite"), capsys)
    main(fit(tmp_path, *short, "--overwrite", "--model.init_args.optimizer.lr", "1e-2"))
    kept = tmp_path / "previous.1"
    assert all(torch.equal(value, weights(kept)["state_dict"][key]) for key, value in first.items())
    assert not all(torch.equal(value, weights(tmp_path)["state_dict"][key]) for key, value in first.items())
    names = {path.name for path in kept.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.csv", "metrics.json", "checkpoints", "merged", *beside} <= names
    assert not list(tmp_path.glob("*.1.*")) and not (tmp_path / "merged").exists()
    assert not any((tmp_path / name).exists() for name in beside)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    capsys.readouterr()
    again = ["fit", "--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path)]
    said = refused(again, capsys)
    assert f"'{tmp_path}'" in said and "--overwrite" in said


def test_a_folder_without_weights_or_measurements_is_not_used(tmp_path: Path) -> None:
    for name in ("config.yaml", "environment.json", "log.txt"):
        (tmp_path / name).touch()
    assert not holds_run(tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)  # sharded
    assert holds_run(tmp_path)


def test_slurm_starts_a_job_again_in_its_own_folder(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_at("on_train_batch_start", 4, killed, fit(tmp_path), monkeypatch)
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "hpc_ckpt_1.ckpt")  # as Lightning's handler leaves it
    said = refused(fit(tmp_path), capsys)
    assert f"'{tmp_path}'" in said and "--overwrite" in said
    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", staticmethod(lambda: True))
        for name, value in {"NTASKS": "1", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
            patch.setenv(f"SLURM_{name}", value)
        main(fit(tmp_path, "--test_after_fit", "false"))
    assert_same_weights(whole, tmp_path)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_second_process_in_a_folder_is_refused_before_anything_is_written(
    whole: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = contents(whole)
    arguments = fit(whole, "--ckpt_path", "last") if command == "fit" else [command, str(whole)]
    with hold(whole):
        assert f"'{whole}'" in refused(arguments, capsys)
    assert contents(whole) == before


@pytest.mark.parametrize(("command", "name"), [("merge", "merged"), ("detach", "detached")])
def test_a_second_phase_in_its_folder_is_refused(
    whole: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    extra = ["--min_contribution", "0"] if command == "detach" else ["--steps", "1"]
    with hold(whole, name):
        assert f"'{whole / name}'" in refused([command, str(whole), *extra], capsys)
    assert not (whole / name).exists()


def test_predict_writes_one_line_for_each_text_of_the_test_images(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(whole)])
    assert str(whole / "predictions.jsonl") in capsys.readouterr().out
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    assert {line["row"] for line in lines} == set(range(8)) and {line["split"] for line in lines} == {"test"}
    assert {line["kind"] for line in lines} == {"dense", "relation", "vsr", "vqa", "pope"}
    saved = load_run(whole)
    saved.data.prepare_data()
    saved.data.setup("test")
    first = next(iter(saved.data.test_dataloader()))
    assert [(line["prompt"], line["answer"]) for line in lines[: len(first.items[0])]] == [
        (item.prompt, list(item.references) or item.answer) for item in first.items[0]
    ]
    with torch.no_grad():  # one by one, by the language model itself
        vision = saved.model.encode(first)
        eos = saved.tokenizer.eos_token_id
        alone = [saved.model.language.generate(vision.rows([0]), [ids], eos_id=eos)[0] for ids in first.prompts[0]]
    assert [line["text"] for line in lines[: len(alone)]] == [decode(ids, saved.tokenizer) for ids in alone]
    assert read(whole / "environment.json")["predict"]["outcome"] == "finished"
    assert not list(whole.glob(".*part"))
    written = (whole / "predictions.jsonl").read_bytes()
    said = refused(["predict", str(whole)], capsys)  # they took hours, perhaps
    assert f"'{whole / 'predictions.jsonl'}'" in said and "--overwrite" in said
    assert (whole / "predictions.jsonl").read_bytes() == written
    main(["predict", str(whole), "--overwrite"])
    assert (whole / "predictions.jsonl").read_bytes() == written


def test_a_predict_that_was_killed_goes_on_from_its_whole_lines(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in run.glob("*predictions*"):
        path.unlink()
    command = ["predict", str(run), "--data.init_args.eval_batch_size", "2"]
    main(command)
    file, part = run / "predictions.jsonl", run / ".predictions.jsonl.part"
    right, counts = file.read_bytes(), []
    lines = right.splitlines(keepends=True)
    part.write_bytes(b"of another call\n")  # --overwrite begins anew
    part.with_name(f"{part.name}.json").write_text("{}", encoding="utf-8")

    def counted(*arguments: Any) -> Any:
        counts.append(len(arguments[0].items))
        if len(counts) == 3 and dies:
            raise Kill
        return write_all(*arguments)

    monkeypatch.setattr("visexpert.methods.base.write_all", counted)
    dies = True
    with pytest.raises(Kill):
        main([*command, "--overwrite"])
    kept = part.read_bytes()
    assert file.read_bytes() == right and right.startswith(kept) and {2, 3} & {json.loads(kept.splitlines()[-1])["row"]}
    dies = False

    with part.open("ab") as file_of_part:  # as kill -9 may leave it: a batch begun, a line cut
        file_of_part.write(lines[kept.count(b"\n")] + b'{"source": "", "spl')
    for changed, told in (
        (["--model.init_args.evaluation.caption_images", "2"], ("model.init_args.evaluation.caption_images", "'1'")),
        (["--data.init_args.num_test", "6"], ("data.init_args.num_test", "'8'", "'6'")),
    ):
        said = refused([*command, *changed], capsys)
        assert all(word in said for word in (*told, "--overwrite", str(part)))
    left = part.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "_digest", lambda model: "other")
        with pytest.raises(SystemExit):
            main(command)
        assert "weights" in capsys.readouterr().err
    part.write_bytes(kept.replace(b'"row": 0', b'"row": 5', 1))
    with pytest.raises(SystemExit):
        main(command)
    assert "row of line 1" in capsys.readouterr().err
    part.write_bytes(left)

    counts.clear()
    main(["predict", str(run), "--data.init_args.eval_batch_size", "3"])  # other batches answer the same
    assert file.read_bytes() == right and counts == [3, 2]
    assert not list(run.glob(".predictions*"))


def test_predict_without_a_language_model_or_a_test_part_is_one_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = ["--model.init_args.language", "visexpert.language.NoLanguage", "--model.init_args.lm_weight", "0"]
    command = ["predict", str(tmp_path), "--config", str(SMOKE.parents[1] / "movekd" / "smoke.yaml")]
    said = refused([*command, *silent], capsys)
    assert "predict" in said and "language model" in said and "MoVEKD" in said
    with monkeypatch.context() as patch:
        patch.setattr(
            "visexpert.tabletop.TabletopData.predict_dataloader", lambda self: []
        )  # as a source without the part
        settings = [word for word in fit(tmp_path)[1:] if word not in ("--run", str(tmp_path))]
        said = refused(["predict", str(tmp_path), *settings], capsys)
    assert "test part" in said and "TabletopData" in said
    assert not list(tmp_path.glob("*predictions*"))


def test_users_loggers_work_beside_the_runs_own(
    whole: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    run, boards = tmp_path / "run", tmp_path / "boards"
    overlay = tmp_path / "logger.yaml"
    overlay.write_text(
        "trainer:\n  logger:\n    - class_path: lightning.pytorch.loggers.TensorBoardLogger\n"
        f"      init_args: {{save_dir: {boards}, name: tove}}\n",
        encoding="utf-8",
    )
    main(fit(run, "--config", str(overlay), "--trainer.max_steps", "4", "--test_after_fit", "false"))
    board = EventAccumulator(str(boards / "tove" / "version_0")).Reload()
    steps, losses = read_metrics(run / "metrics.csv")["train/loss"]
    assert [event.step for event in board.Scalars("train/loss")] == steps.tolist() == [0, 1, 2, 3]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses.tolist())
    assert {"checkpoints", "config.yaml", "metrics.json"} <= {path.name for path in run.iterdir()}
    assert not list(boards.rglob("*.ckpt")) and weights(run)["global_step"] == 4
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]["logger"]
    assert [entry["class_path"] for entry in saved] == ["lightning.pytorch.loggers.TensorBoardLogger"]
    main(["validate", str(run)])
    assert (boards / "tove" / "version_1").is_dir() and load_run(run).steps == 4


@pytest.mark.parametrize("logger", ["true", "false"])
def test_a_run_without_loggers_of_the_user_says_so(cache: Path, tmp_path: Path, logger: str) -> None:
    short = ["--trainer.max_steps", "1", "--test_after_fit", "false", "--trainer.logger", logger]
    main(fit(tmp_path, *short))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["trainer"]["logger"] is None
    assert (tmp_path / "metrics.csv").is_file() and not (tmp_path / "lightning_logs").exists()


PHASES = {
    "detach": ["--keep", "1", "--timing_seconds", "0", "--retune_steps", "2"],
    "merge": ["--steps", "2"],
}


@pytest.fixture(scope="module", params=["merge", "detach"])
def unbroken(request: pytest.FixtureRequest, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A phase, and a run that nothing stopped in it."""
    run = copied(whole, tmp_path_factory.mktemp(request.param) / "unbroken")
    main([request.param, str(run), *PHASES[request.param], "--eval_every", "2", "--checkpoint_every", "2"])
    return request.param, run


def copied(whole: Path, run: Path) -> Path:
    return Path(shutil.copytree(whole, run, ignore=shutil.ignore_patterns(".*", "figures")))


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_phase_that_is_ended_and_given_again_has_all_its_metrics(
    whole: Path, unbroken: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    command, never_ended = unbroken
    phase = [*PHASES[command], "--eval_every", "2", "--checkpoint_every", "2"]
    runs = [copied(whole, tmp_path / "broken"), never_ended]
    with monkeypatch.context() as patch, pytest.raises((SystemExit, Kill)) as ended:
        if end == "killed":  # after the last step, before the scores
            patch.setattr(ToVE, "on_test_epoch_start", lambda self: killed())
        else:  # in the validation after the last step
            begin = Method.on_validation_epoch_start
            patch.setattr(Method, "on_validation_epoch_start", lambda self: (sent(signal.SIGTERM)(), begin(self)))
        main([command, str(runs[0]), *phase])
    assert getattr(ended.value, "code", 143) == 143
    name = {"merge": "merged", "detach": "detached"}[command]
    assert not (runs[0] / name / "checkpoints" / "last.ckpt").exists()
    main([command, str(runs[0]), *phase])
    broken, expected = (read(run / name / "metrics.json") for run in runs)
    unsure = {"cost/others_cpu_share"}  # needs times that are not too short
    assert broken.keys() - unsure == expected.keys() - unsure
    assert timeless(broken) == timeless(expected)
