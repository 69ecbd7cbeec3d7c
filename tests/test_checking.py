"""Settings that cannot be: each command line ends in one sentence that names the value and what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

from tests.data.formats import write_json
from visexpert.checking import PROFILERS, check_machine, check_run, check_settings
from visexpert.cli import main
from visexpert.errors import ConfigError

SMOKE = Path(__file__).parents[1] / "configs" / "tove" / "smoke.yaml"
TOVE = "visexpert.methods.ToVE"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored after the test: Lightning sets it
    monkeypatch.chdir(tmp_path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that ends a command with exit code 2, before anything is written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("visexpert: ") and "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("setting", "value", "fragments"),
    [
        ("model.init_args.optimizer.lr", "-1", [f"{TOVE}: optimizer.lr is -1", "not be negative"]),
        ("model.init_args.optimizer.lr", "1e400", ["lr is inf", "finite"]),
        ("model.init_args.optimizer.lr", "null", ["optimizer.lr", "number", "None"]),
        ("model.init_args.optimizer.betas", "[0.9, 1.5]", ["betas", "1.5", "below 1"]),
        ("model.init_args.optimizer.weight_decay", "true", ["weight_decay", "number", "True"]),
        ("model.init_args.adapter_hidden", "0", ["adapter_hidden is 0", "at least 1"]),
        ("model.init_args.language.init_args.heads", "0", ["heads is 0", "at least 1"]),
        ("model.init_args.language.init_args.depth", "null", ["depth is null", "leave it out for 2"]),
        ("model.init_args.clip.init_args.config.hidden_size", "[1]", ["ClipEncoder", "hidden_size", "[1]"]),
        ("model.init_args.clip.init_args.image_size", "0", ["image_size is 0", "at least 1"]),
        ("data.init_args.num_train", "null", ["num_train is null"]),
        ("data.init_args.num_train", "9" * 30, ["data.init_args.num_train is 1e+30", "finite number"]),
        ("checkpoint_every", "-3", ["checkpoint_every is -3", "at least 1"]),
        ("checkpoint_every", "0", ["checkpoint_every is 0", "at least 1"]),
        ("seed_everything", "true", ["seed_everything is True", "4294967295"]),
        ("seed_everything", "false", ["seed_everything is False", "4294967295"]),
        ("seed_everything", "-1", ["seed_everything is -1", "4294967295"]),
        ("seed_everything", "4294967296", ["seed_everything is 4294967296", "4294967295"]),
        ("seed_everything", "text", ["seed_everything", "text", "whole number"]),
        ("run", "", ["run is ''", "folder"]),
        ("trainer.max_steps", "-1", ["max_steps is -1", "max_epochs"]),
        ("trainer.max_steps", "0", ["max_steps is 0", "at least 1"]),
        ("trainer.accelerator", "gpuu", ["trainer.accelerator is 'gpuu'", "auto, gpu, cpu, cuda", "mean 'gpu'"]),
        ("trainer.devices", "0", ["trainer.devices is '0'", "from 1"]),
        ("trainer.precision", "bf17", ["trainer.precision is 'bf17'", "32, 16, transformer-engine", "mean 'bf16'"]),
        ("trainer.strategy", "dpp", ["trainer.strategy is 'dpp'", "ddp, ", "deepspeed_stage_2", "mean 'ddp'"]),
        ("trainer.gradient_clip_algorithm", "foo", ["gradient_clip_algorithm is 'foo'", "norm, value"]),
        ("trainer.val_check_interval", "2.5", ["val_check_interval is 2.5", "(0, 1]", "whole number of batches"]),
        ("trainer.max_time", "abc", ["trainer.max_time is 'abc'", "DD:HH:MM:SS"]),
        ("trainer.barebones", "true", ["barebones"]),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    setting: str, value: str, fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", "--config", str(SMOKE), "--run", str(tmp_path / "run"), f"--{setting}", value], capsys)
    assert not [fragment for fragment in fragments if fragment not in line], line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("accumulate_grad_batches", 0, "at least 1"),
        ("accumulate_grad_batches", -2, "at least 1"),
        ("check_val_every_n_epoch", 0, "at least 1"),
        ("val_check_interval", 0, "above 0"),
        ("val_check_interval", -1, "above 0"),
        ("gradient_clip_val", -1, "at least 0"),
        ("log_every_n_steps", -1, "at least 0"),
        ("num_sanity_val_steps", -5, "at least -1"),
        ("limit_train_batches", 0, "above 0"),
        ("min_steps", -1, "at least 0"),
        ("num_nodes", 0, "at least 1"),
        ("devices", "x", "auto, a number from 1"),
        ("devices", "1;2", "auto, a number from 1"),
        ("profiler", "simpel", "simple, advanced, pytorch, xla"),
        ("max_steps", -5, "-1"),
        ("max_epochs", 0, "at least 1"),
        ("max_epochs", -2, "-1"),
    ],
)
def test_what_the_trainer_trips_over_is_refused(name: str, value: float | str, allowed: str) -> None:
    run = {"seed_everything": 0, "run": "runs/a", "checkpoint_every": 5}
    trainer = {"max_steps": 10, "num_sanity_val_steps": -1, "limit_val_batches": 0, "check_val_every_n_epoch": None}
    check_run({**run, "trainer": trainer}, trains=True)
    with pytest.raises(ConfigError, match=f"{name} is '?{value}'?.*{allowed}"):
        check_run({**run, "trainer": {**trainer, name: value}}, trains=True)


def test_an_end_of_training_may_be_set_in_any_way() -> None:
    run = {"seed_everything": 0, "run": "runs/a", "checkpoint_every": 5}
    ends: list[dict[str, Any]] = [{"max_steps": 3}, {"max_epochs": 3}, {"max_epochs": -1}, {"max_time": "00:01:00:00"}]
    for trainer in ends:
        check_run({**run, "trainer": {"max_steps": -1, **trainer}}, trains=True)
    check_run({**run, "trainer": {"max_steps": -1}}, trains=False)
    with pytest.raises(ConfigError, match="max_time"):
        check_run({**run, "trainer": {"max_steps": -1}}, trains=True)


def test_null_is_refused_only_where_the_type_has_no_place_for_it() -> None:
    open_ones = {"use": None, "optimizer": {"gate_lr": None}, "evaluation": {"meteor": None}}
    check_settings({"model": {"class_path": TOVE, "init_args": open_ones}})
    check_settings({"model": {"class_path": "visexpert.vision.ClipEncoder", "init_args": {"layer": -2}}})
    check_settings({"a": {"class_path": "collections.OrderedDict", "init_args": {"x": None, "y": -3}}})
    nested = {"experts": {"one": {"class_path": TOVE, "init_args": {"optimizer": {"warmup_steps": None}}}}}
    with pytest.raises(ConfigError, match=r"ToVE: optimizer.warmup_steps is null.*100"):
        check_settings({"callbacks": [nested]})


def config_files() -> Iterator[tuple[str, bytes, list[str]]]:
    """Contents of files that are no configuration, with what is said of them."""
    smoke = SMOKE.read_text(encoding="utf-8")
    yield "empty", b"", ["is empty", "mapping"]
    yield "comment", b"# nothing\n", ["is empty"]
    yield "list", b"- a\n- b\n", ["is a list", "mapping"]
    yield "text", b"just text", ["is a str"]
    yield "number", b"42", ["is a int"]
    yield "unfinished", b"model: [", ["line "]
    yield "tabs", b"model:\n\tclass_path: x\n", ["line 2", "cannot start any token"]
    yield "deep", b"a: " + b"[" * 30000, ["nest"]
    yield "latin1", b"run: caf\xe9\n", ["UTF-8", "0xe9"]
    yield "nul", b"\0\1", ["cannot be read as YAML", "#x0000"]
    yield "tag", b"a: !!python/object/apply:os.system [ls]", ["line 1", "python/object/apply:os.system"]
    yield "documents", b"---\na: 1\n---\nb: 2\n", ["line 3", "another document"]
    yield (
        "twice",
        smoke.replace("seed_everything: 0", "seed_everything: 0\nseed_everything: 1").encode(),
        [
            "line 5",
            "'seed_everything' comes twice",
        ],
    )
    yield "interpolation", smoke.replace("max_steps: 8", "max_steps: ${nothing.here}").encode(), ["nothing.here"]
    for value in ("3", "true", "[]", "null", "[a]"):
        yield f"trainer {value}", yaml.safe_dump({"trainer": yaml.safe_load(value)}).encode(), ["trainer is", "mapping"]
    yield "no class", b"model: {}\ndata: {}\ntrainer: {max_steps: 1}\n", ["model", "class_path"]


@pytest.mark.parametrize(
    ("content", "fragments"), [each[1:] for each in config_files()], ids=[each[0] for each in config_files()]
)
def test_a_file_that_is_no_configuration_is_named(
    content: bytes, fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    line = refused(["fit", "--config", str(path), "--run", str(tmp_path / "run")], capsys)
    assert not [fragment for fragment in [*fragments] if fragment not in line], line
    assert not (tmp_path / "run").exists()


def test_what_is_no_file_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        for command in (["fit", "--config"], ["plan", "--config"], ["data", "check"]):
            line = refused([*command, str(path)], capsys)
            assert str(path) in line and ("a folder" if path.is_dir() else "not a regular file") in line


def test_a_config_of_utf8_with_a_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel:\n  class_path: x\n")
    from visexpert.io.reading import read_yaml

    assert read_yaml(path) == {"model": {"class_path": "x"}}


def test_without_a_progress_bar_a_run_goes_through(tmp_path: Path) -> None:
    """Lightning refuses the bar that every run carries where bars are off."""
    from visexpert.training import build_cli

    off = ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "99999999999"]
    cli = build_cli(["--config", str(SMOKE), "--run", str(tmp_path / "run"), *off], run=False)
    assert cli.trainer.progress_bar_callback is None


@pytest.mark.parametrize("config", ["model: 3\ndata: {}\n", "[]", "model: ["])
@pytest.mark.parametrize("command", ["caption", "merge"])
def test_a_run_whose_configuration_is_none_is_refused(
    command: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert "config.yaml" in refused([command, str(tmp_path), *["x.png"] * (command == "caption")], capsys)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_machine_without_a_gpu_is_told_what_to_type(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as refused:
        check_machine({"accelerator": accelerator, "devices": 8, "strategy": "deepspeed_stage_2"})
    for part in (f"accelerator is {accelerator}", "--trainer.accelerator cpu", "--trainer.devices 1", "num_nodes 1"):
        assert part in str(refused.value)
    check_machine({"accelerator": "auto", "devices": "auto", "strategy": "auto"})


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_2", {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"}]
)
def test_a_missing_deepspeed_names_the_extra(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.checking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed; .*'visexpert\[deepspeed\]'"):
        check_machine({"accelerator": "cpu", "strategy": strategy})
    monkeypatch.setattr("visexpert.checking.find_spec", lambda name: object())
    check_machine({"accelerator": "cpu", "strategy": strategy})


CONFIGS = SMOKE.parents[1]
ON_CPU = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
]


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no model, data or trainer be built as for training."""

    def build(self: LightningCLI) -> None:
        raise AssertionError("models are built")

    monkeypatch.setattr(LightningCLI, "instantiate_classes", build)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ("movekd/llava/stage1.yaml", "blip_laion_cc_sbu_558k.json"),
        ("movekd/llava/stage2.yaml", "llava_v1_5_mix665k.json"),
        ("tove/paper/vit-b16.yaml", "dataset_coco.json"),
    ],
)
def test_missing_data_is_one_sentence_before_models_are_built(
    no_models: None, config: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", "--config", str(CONFIGS / config), *ON_CPU], capsys)
    assert missing in line and "get it from" in line and "more are missing" in line and "visexpert data check" in line


def test_data_of_the_test_is_looked_for_before_a_fit(
    no_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "talk.json", [])
    talk = {"class_path": "visexpert.data.LLaVAInstruct", "init_args": {"root": ".", "annotations": "talk.json"}}
    coco = {"class_path": "visexpert.data.COCOCaptions", "init_args": {"root": "nowhere"}}
    arguments = {"sources": {"talk": talk, "coco": coco}, "train": {"talk": 1}, "test": ["coco"]}
    overlay = {"data": {"class_path": "visexpert.data.MixedData", "init_args": arguments}}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    fit = ["fit", "--config", str(SMOKE), "--config", "mixed.yaml"]
    line = refused(fit, capsys)
    assert "nowhere" in line and "--test_after_fit false" in line
    assert "models are built" in refused([*fit, "--test_after_fit", "false"], capsys)


@pytest.mark.parametrize(("command", "part"), [("test", "test"), ("validate", "val")])
def test_a_command_without_its_part_of_the_data_is_one_sentence(
    command: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"class_path": "visexpert.data.LLaVAInstruct", "init_args": {"root": str(tmp_path)}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": source}))
    line = refused([command, "--config", str(SMOKE), "--config", str(tmp_path / "data.yaml")], capsys)
    assert f"{command} scores the {part} part" in line and "LLaVAInstruct has none" in line


def test_the_profilers_are_those_that_lightning_names() -> None:
    with pytest.raises(MisconfigurationException) as error:
        L.Trainer(profiler="zzz", logger=False, enable_checkpointing=False)
    assert tuple(re.findall(r"'(\w+)'", str(error.value))) == PROFILERS


LOGGER = "lightning.pytorch.loggers.MLFlowLogger"


@pytest.fixture
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import mlflow
    from lightning_utilities.core.imports import RequirementCache

    for name in [each for each in vars(mlflow) if each.startswith("_MLFLOW_") and each.endswith("AVAILABLE")]:
        monkeypatch.setattr(mlflow, name, RequirementCache("no-such-package>=1.0"))


@pytest.mark.usefixtures("_no_mlflow")
@pytest.mark.parametrize("given", [[{"class_path": LOGGER}], {"class_path": LOGGER}], ids=["in a list", "alone"])
def test_a_missing_package_of_a_class_is_named(
    given: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "logger.yaml", {"trainer": {"logger": given}})
    line = refused(["fit", "--config", str(SMOKE), "--config", "logger.yaml"], capsys)
    for part in (LOGGER, "no-such-package>=1.0", "pip install"):
        assert part in line


@pytest.mark.parametrize("text", ["import no_such_package.inner", "from no_such_package import x"])
def test_a_missing_package_that_a_module_of_the_user_imports_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"needy_{len(text)}"
    (tmp_path / f"{module}.py").write_text(f"{text}\n\nclass Watch:\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = refused(["fit", "--config", str(SMOKE), f"--trainer.callbacks+={module}.Watch"], capsys)
    assert f"{module}.Watch needs the module no_such_package" in line
    assert "pip install" not in line  # the name may be misspelled, and someone else's on an index


def test_a_class_in_a_list_that_refuses_its_settings_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """from lightning.pytorch.callbacks import Callback

class Watch(Callback):
    def __init__(self, every: int) -> None:
        raise ValueError(f"every is {every}, but must be even")
"""
    (tmp_path / "watching.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["--trainer.callbacks+=watching.Watch", "--trainer.callbacks.every=3"]
    line = refused(["fit", "--config", str(SMOKE), *given], capsys)
    assert "watching.Watch" in line and "every is 3, but must be even" in line
