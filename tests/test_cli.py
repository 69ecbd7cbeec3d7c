"""The command line: a run's folder, scoring it again, and errors of one sentence."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.io.test_checkpoints import DAMAGED
from tests.sharded_parts import as_deepspeed, as_fsdp, copy_run
from visexpert import training
from visexpert.cli import _quieten, main
from visexpert.io.checkpoints import load_checkpoint
from visexpert.methods.start import start_from
from visexpert.noise import NOISE
from visexpert.parse_errors import explain
from visexpert.report import read_metrics
from visexpert.runs import load_run
from visexpert.types import Batch

SMOKE = Path(__file__).parents[1] / "configs" / "tove" / "smoke.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a run seed of this file's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        yield folder


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke run."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    main(["fit", "--config", str(SMOKE), "--run", str(folder)])
    return folder


def test_noise_of_libraries_is_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.trainer.connectors.logger_connector import result

    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    logger = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        _quieten()
        collection = result._ResultCollection(training=False)
        collection.log("test_step", "a", torch.tensor(1.0), on_step=False, on_epoch=True, batch_size=1)
        result.warning_cache.clear()
        result._ResultCollection._get_cache(collection["test_step.a"], on_step=False)
        assert not shown  # but for the filter Lightning would recommend sync_dist here
        for message, module in NOISE:
            text = message.replace(".*", "x").replace("\\", "")
            for name in (module.replace("\\", "") + "x" * module.endswith("."), "torch.optim"):
                warnings.warn_explicit(text, UserWarning, name, 1, module=name)
        warnings.warn_explicit("a loss is NaN", UserWarning, "fit_loop", 1, module="lightning.pytorch.loops.fit_loop")
    assert [str(one.filename) for one in shown] == ["torch.optim"] * len(NOISE) + ["fit_loop"]
    for level, text, passes in (
        (logging.INFO, "`weights_only` was not set, defaulting to `False`.", False),
        (logging.INFO, "Restored all states", True),
        (logging.ERROR, "`weights_only` was not set", True),
    ):
        record = logger.makeRecord(logger.name, level, "", 1, text, (), None)
        assert bool(logger.filter(record)) == passes


def metrics_of(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert isinstance(metrics, dict)
    return metrics


def test_a_run_leaves_its_whole_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "metrics.json", "environment.json", "figures", "checkpoints"} <= names
    assert {"loss_curves.png", "gate_maps.png"} <= {path.name for path in (run / "figures").iterdir()}
    metrics = metrics_of(run)
    assert all(isinstance(value, float) for value in metrics.values())
    assert {"train/loss", "val/nll/nll", "test/nll/nll", "test/vqa/accuracy"} <= metrics.keys()
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["fit"]["seed"] == 0 and "torch" in environment["fit"]["versions"]


def test_the_log_holds_every_step(run: Path) -> None:
    logged = read_metrics(run / "metrics.csv")
    assert "train/loss" in logged and "train/balance_loss" in logged
    assert len(logged["train/loss"][0]) == 8


def test_the_checkpoint_is_plain_and_holds_no_frozen_part(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8  # the end, though checkpoints are saved at multiples of three
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"projector", "adapters", "gate", "language"}


class Interrupt(Callback):
    """Stops the run in mid-epoch, as Ctrl-C does."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_continues_to_the_same_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.parent / "interrupted"
    fit = ["fit", "--config", str(SMOKE), "--run", str(folder), "--test_after_fit", "false"]
    callbacks = training.default_callbacks
    monkeypatch.setattr(training, "default_callbacks", lambda: [*callbacks(), Interrupt()])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(fit)
    monkeypatch.setattr(training, "default_callbacks", callbacks)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    main([*fit, "--ckpt_path", "last"])
    whole, continued = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (run, folder)
    )
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


def test_scoring_the_run_again_gives_its_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = metrics_of(run)
    (run / "metrics.json").unlink()
    main(["test", str(run)])
    assert capsys.readouterr().out.splitlines()[-1] == f"Next: visexpert caption {run} IMAGE"
    again = metrics_of(run)
    scores = {key: value for key, value in first.items() if key.startswith("test/") and "/" in key[5:]}
    assert len(scores) > 20
    assert {key: again[key] for key in scores if "_per_s" not in key} == pytest.approx(
        {key: value for key, value in scores.items() if "_per_s" not in key}, rel=1e-5
    )
    assert {path.name for path in (run / "figures").iterdir()} >= {"gate_maps.png"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that ends a command with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("visexpert: ")
    return lines[0].removeprefix("visexpert: ")


def edited(tmp_path: Path, old: str, new: str) -> list[str]:
    """``fit`` with a smoke configuration in which one thing is wrong."""
    text = SMOKE.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return ["fit", "--config", str(path), "--run", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "warmup_steps:",
            "warmup_step:",
            "visexpert.methods.ToVE has no setting 'warmup_step'; did you mean 'optimizer.warmup_steps'",
        ),
        (
            "depth: 1, heads: 2}",
            "dept: 1, heads: 2}",
            "visexpert.language.CrossAttentionDecoder has no setting 'dept'; did you mean 'depth'",
        ),
        ("max_steps:", "max_stepps:", "There is no setting 'trainer.max_stepps'; did you mean 'trainer.max_steps'"),
        (
            "arch: {kind: vit,",
            "archi: {kind: vit,",
            "visexpert.tabletop.TinyExpert has no setting 'archi'; did you mean 'arch'",
        ),
        (
            "visexpert.tabletop.TabletopData",
            "visexpert.tabletop.TableTopData",
            "There is no class 'visexpert.tabletop.TableTopData'; did you mean 'TabletopData'",
        ),
        ("tokens: prediction", "tokens: predictions", "predictions"),
        (
            "num_train: 32",
            "num_train: many",
            "visexpert.tabletop.TabletopData: num_train is 'many', but must be a whole number.",
        ),
        ("num_train: 32", "num_train: 0", "TabletopData.num_train is 0, but must be at least 1"),
        ("layer: -2", "layer: -9", "ClipEncoder: layer=-9 is outside -3..-1 of an encoder with 2 layers"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, sentence: str
) -> None:
    assert sentence in refused(edited(tmp_path, old, new), capsys)
    assert not (tmp_path / "run").exists()


def test_an_unknown_expert_or_one_without_weights(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depth = "experts.depth.class_path"
    message = refused(
        ["fit", "--config", str(SMOKE), f"--model.init_args.{depth}", "visexpert.tabletop.TinyExprt"], capsys
    )
    assert message.startswith("There is no class 'visexpert.tabletop.TinyExprt'; did you mean 'TinyExpert'")
    semantic = "arch: {kind: vit, image_size: 48, network: {patch_size: 12, token_dim: 24, depth: 1, num_heads: 2}}"
    message = refused(edited(tmp_path, semantic, 'source: "zoo:smell"'), capsys)
    assert message.startswith("TinyExpert: no weights at") and "smell" in message and "'semantic'" in message


def test_a_wrong_command_line_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["test", str(tmp_path)], capsys)
    assert message.startswith(f"'{tmp_path}' is not a run: it has no config.yaml; give the folder that")
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert "has no checkpoint" in refused(["test", str(tmp_path)], capsys)
    message = refused(["fit", "--config", str(SMOKE), "--ckpt_path", str(tmp_path / "a.ckpt")], capsys)
    assert message.startswith("There is no checkpoint") and "'last' to continue a run" in message
    message = refused(["fit", "--config", str(tmp_path / "absent.yaml")], capsys)
    assert "absent.yaml" in message and "visexpert configs list" in message
    assert "did you mean 'trainer.max_steps'" in refused(["fit", "--trainer.max_stepz", "3"], capsys)


def test_the_commands_that_are_proposed_work_when_typed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    shutil.copytree(run, folder)
    asked, words = ["detach", "merge", "export", "try"], ["detach", str(folder)]
    quick = {"detach": ["--min_contribution", "-1", "--retune_steps", "1"], "merge": ["--steps", "1"]}
    for command in asked:
        main([*words, *quick.get(command, [])])
        told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
        proposed = [shlex.split(each)[1:] for each in told.removeprefix("Next: ").split(", or ")]
        following = dict(zip(asked, asked[1:], strict=False)).get(command)
        words = next((each for each in proposed if each[0] == following), [])
        assert words or following is None, told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["fit", "--config="], ("--config", "empty", "visexpert configs list")),
        (["fit", "--config", str(SMOKE), "--config", ""], ("--config", "empty")),
        (["fit", "--config", "{run}"], ("'{run}'", "folder", "{run}/config.yaml")),
        (["fit", "--config", "{run}/checkpoints"], ("'{run}/checkpoints'", "folder")),
        (["fit", "--config", str(SMOKE), "--trainer.max_steps="], ("trainer.max_steps is ''", "a whole number")),
        (["test", "tove/smoke"], ("'tove/smoke'", "configuration", "visexpert fit --config tove/smoke")),
        (["caption", "configs/tove/smoke.yaml", "a.png"], ("configuration", "visexpert fit --config tove/smoke")),
        (["export", "{run}/config.yaml", "--format", "hf", "--out", "{run}/x"], ("is a file", "'{run}'")),
        (["merge", "{run}", "--config", "tove/nothing"], ("tove/nothing", "visexpert configs list")),
        (["merge", "{run}", "--config", "tove/smoke"], ("tove/smoke.yaml", "model and trainer", "steps", "merging")),
        (["detach", "{run}", "--config", "tove/smoke"], ("model and trainer", "min_contribution", "leave it out")),
        (["detach", "{run}", "--config="], ("--config", "empty")),
        (["fit", "--version"], ("version", "visexpert --version")),
    ],
)
def test_one_thing_given_for_another_names_what_was_meant(
    run: Path, line: list[str], told: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([word.replace("{run}", str(run)) for word in line], capsys)
    assert [words for words in told if words.replace("{run}", str(run)) not in said] == [], said
    assert "<class" not in said


def test_a_report_with_every_kind_of_noise_becomes_one_sentence() -> None:
    report = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'visexpert.methods.ToVE':
        Parser key "top_k":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'int'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'int'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: two
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'visexpert.methods.ToVE', 'init_args': {'clip': {'class_path': 'ClipEncoder'}}}
"""
    assert explain(report, []) == "visexpert.methods.ToVE: top_k is 'two', but must be a whole number."


def test_a_name_like_no_other_lists_what_there_is() -> None:
    message = "Problem with given class_path 'visexpert.transfer.ResidualTransfer':\n  Option 'zzz' is not accepted"
    assert explain(message, []) == "visexpert.transfer.ResidualTransfer has no setting 'zzz'; known are mode."


def test_folders_of_shards_are_read_by_every_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_checkpoint(run / "checkpoints" / "last.ckpt", owner="test")["state_dict"]
    for engine in ("fsdp", "deepspeed"):
        folder = copy_run(run, tmp_path / engine)
        last = folder / "checkpoints" / "last.ckpt"
        file = last.rename(tmp_path / f"{engine}.file")
        if engine == "fsdp":
            as_fsdp(file, last)
        else:
            as_deepspeed(file, last, monkeypatch)
        saved = load_run(folder)  # as export, detach, merge, caption and serve do
        assert saved.steps == 8
        state = saved.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain.items())
        method = load_run(copy_run(run, tmp_path / f"{engine}-start")).model
        torch.nn.init.zeros_(next(method.parameters()))
        start_from(method, str(last))
        assert all(torch.equal(method.state_dict()[key], value) for key, value in plain.items())
    main(["test", str(tmp_path / "fsdp")])
    for name, value in metrics_of(tmp_path / "fsdp").items():
        if name.endswith(("nll", "accuracy")):
            assert value == pytest.approx(metrics_of(run)[name], abs=1e-6), name


def test_a_damaged_last_checkpoint_gives_way_to_a_whole_one_and_says_so(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_run(run, tmp_path / "run")
    last = folder / "checkpoints" / "last.ckpt"
    shutil.copy2(run / "checkpoints" / "step=6.ckpt", last.parent)
    last.write_bytes(last.read_bytes()[:5000])
    main(["fit", "--config", str(SMOKE), "--run", str(folder), "--ckpt_path", "last", "--test_after_fit", "false"])
    assert "step=6.ckpt" in caplog.text
    found, wanted = (load_checkpoint(path / "checkpoints" / "last.ckpt", owner="test") for path in (folder, run))
    assert found["global_step"] == 8 and not list(last.parent.glob("last-v*"))
    for key, value in wanted["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value)


@pytest.mark.parametrize("kind", ["empty", "cut", "code", "foreign"])
def test_no_command_shows_a_traceback_for_a_checkpoint_that_cannot_be_read(
    run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_run(run, tmp_path / "run")
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(DAMAGED[kind](tmp_path))
    start = ["--model.init_args.init_from", str(last)]
    for arguments in (
        ["fit", "--config", str(SMOKE), "--run", str(tmp_path / "new"), "--ckpt_path", str(last)],
        ["fit", "--config", str(SMOKE), "--run", str(folder), "--ckpt_path", "last"],
        ["fit", "--config", str(SMOKE), "--run", str(tmp_path / "new"), *start],
        ["test", str(folder)],
        ["test", str(run), "--ckpt_path", str(last)],
        ["export", str(folder), "--format", "hf", "--out", str(tmp_path / "out")],
        ["detach", str(folder), "--keep", "1"],
        ["merge", str(folder)],
    ):
        message = refused(arguments, capsys)
        assert "last.ckpt" in message and "\n" not in message.strip(), arguments
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new" / "checkpoints").exists()


def test_validation_at_a_share_of_an_epoch_in_a_run_that_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The shipped configurations count steps, ``check_val_every_n_epoch: null``, which goes with whole numbers."""
    folder = tmp_path / "share"
    options = ["--trainer.val_check_interval", "0.25", "--trainer.max_steps", "1", "--test_after_fit", "false"]
    main(["fit", "--config", str(SMOKE), "--run", str(folder), *options, "--ckpt_path", "last"])
    assert f"'{folder}' has no checkpoint, so this starts anew" in caplog.text
    trainer = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    assert (trainer["val_check_interval"], trainer["check_val_every_n_epoch"]) == (0.25, 1)
    assert "val/nll/nll" in metrics_of(folder)


def test_the_whole_help_shows_every_setting_of_the_command_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("validate", "predict"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help", "all"])
        told = capsys.readouterr().out
        shown = ["--trainer.max_steps", "--trainer.profiler", "--model", "--data", "--run", "--ckpt_path"]
        assert ended.value.code == 0 and [name for name in shown if name not in told] == []
        assert ("--return_predictions" in told) == (command == "predict")
