"""Hints for settings that do not exist: names of earlier versions, the group that a setting is in, misspelled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from visexpert.cli import main
from visexpert.errors import ConfigError
from visexpert.methods.base import Method as Base
from visexpert.parse_errors import explain
from visexpert.planning.read import parse_configs
from visexpert.shipped import shipped
from visexpert.training import RunParser, build_cli

TOVE, MOVEKD = "visexpert.methods.ToVE", "visexpert.methods.MoVEKD"


def refused(kind: str, setting: str, value: str) -> str:
    parser = RunParser(parser_mode="omegaconf")
    parser.add_subclass_arguments(Base, "model")
    with pytest.raises(ConfigError) as error:
        parser.parse_args(["--model", kind, f"--model.{setting}", value])
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("agglomeration.image_sizes", "64", "agglomeration.image_sizes is '64', but must be a list, such as [1, 2]."),
        ("experts", "5", "experts is '5', but must be a mapping, such as {name: value}."),
    ],
)
def test_a_value_where_several_belong_is_told_their_form(setting: str, value: str, told: str) -> None:
    assert refused(MOVEKD, setting, value).endswith(told)


@pytest.mark.parametrize(
    ("kind", "setting", "meant"),
    [
        (TOVE, "gate_hidden", "gate.hidden"),
        (TOVE, "gate_noise", "gate.noise"),
        (TOVE, "top_k", "gate.top_k"),
        (TOVE, "feature_cache", "store.folder"),
        (TOVE, "feature_dtype", "store.dtype"),
        (TOVE, "projector_norm", "projector.norm"),
        (TOVE, "lr", "optimizer.lr"),
        (TOVE, "learning_rate", "optimizer.lr"),
        (TOVE, "optimizer.learning_rate", "optimizer.lr"),
        (TOVE, "caption_images", "evaluation.caption_images"),
        (MOVEKD, "teacher_weighting", "weighting.teachers"),
        (MOVEKD, "token_weighting", "weighting.tokens"),
        (MOVEKD, "detach_weights", "weighting.detach"),
        (MOVEKD, "anchor_share", "weighting.clip_teacher_weight"),
        (MOVEKD, "direction", "heads.alignment"),
        (MOVEKD, "adapter", "heads.adapter"),
        (MOVEKD, "adapter_hidden", "heads.hidden"),
        (MOVEKD, "text_weight", "lm_weight"),
        (MOVEKD, "balance_weight", "auxiliary.balance_weight"),
        (MOVEKD, "balance_form", "auxiliary.balance_form"),
        (MOVEKD, "keep_pooled", "auxiliary.keep_pooled"),
    ],
)
def test_names_of_earlier_versions_lead_to_those_of_today(kind: str, setting: str, meant: str) -> None:
    message = refused(kind, setting, "1")
    assert message.startswith(f"{kind} has no setting") and f"did you mean '{meant}'?" in message


@pytest.mark.parametrize(
    ("kind", "group", "value", "inside"),
    [
        (TOVE, "gate", "token", "kind, hidden"),
        (TOVE, "store", "auto", "folder, dtype"),
        (MOVEKD, "heads", "x", "hidden"),
    ],
)
def test_one_value_for_a_group_of_settings(kind: str, group: str, value: str, inside: str) -> None:
    message = refused(kind, group, value)
    assert f"{group} is '{value}'" in message and inside in message and "NestedArg" not in message


def test_a_phase_without_its_group() -> None:
    parser: Any = ArgumentParser()
    for name in ("merging.lm_weight", "optimizer.lr", "steps"):
        parser.add_argument(f"--{name}", type=float)
    known = [action.dest for action in parser._actions]
    assert "'optimizer.lr'" in explain("unrecognized arguments: --lr 1", known)
    assert "'merging.lm_weight'" in explain("unrecognized arguments: --text_weight 1", known)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "ToVEE", ["model:", "'ToVEE'", "'ToVE'"]),
        ("data", "TableTopData", ["data:", "'TableTopData'", "'TabletopData'"]),
        ("trainer.callbacks", "EarlyStoping", ["'EarlyStoping'", "'EarlyStopping'"]),
        ("trainer.logger", "CSVLoger", ["'CSVLoger'", "'CSVLogger'"]),
        ("trainer.precision", "17", ["trainer.precision", "'17'", "bf16-mixed", "32-true"]),
        ("trainer.max_steps", "many", ["trainer.max_steps", "'many'", "whole number"]),
        ("trainer.callbacks+", "EarlyStopping", ["EarlyStopping", "needs monitor"]),
        ("data.init_args.num_train", "many", ["TabletopData", "num_train", "'many'", "whole number"]),
        ("model.init_args.gate.kind", "foo", ["gate.kind", "'foo'", "token, uniform"]),
        ("model.init_args.experts.depth", "TinyExprt", ["experts.depth", "'TinyExprt'", "'TinyExpert'"]),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(key: str, value: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build_cli(["fit", "--config", "tove/smoke", f"--{key}={value}"])
    message = str(error.value)
    assert [part for part in said if part not in message] == [] and "\n" not in message
    assert not any(noise in message for noise in ("<class", "typing.", "Subclass", "dot import"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["test"], "visexpert test RUN"),
        (["validate", "--data.init_args.batch_size", "3", "runs/x"], "visexpert validate RUN"),
        (["fit", "runs/x", "--config", "tove/smoke"], "--run runs/x"),
        (["detach"], "required: RUN"),
    ],
)
def test_a_run_in_the_wrong_place_is_told_its_place(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model:\n  class_path: visexpert.methods.ToVE\n  init_args:\n", "line 3"),
        ("trainer:\n  callbacks:\n    - class_path:\n", "line 3"),
        ("model:\n  init_args: {a: [1, 2\ndata:\n", "line 3"),
    ],
)
def test_an_unfinished_file_is_told_with_its_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=line) as error:
        build_cli(["fit", "--config", str(path)])
    assert str(path) in str(error.value)


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": {"class_path": "os.system", "init_args": {"command": "touch {}"}}},
    "data": {"data": {"class_path": "subprocess.getoutput", "init_args": {"cmd": "touch {}"}}},
    "callback": {
        "trainer": {"callbacks": [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{}"]}}]}
    },
    "strategy": {"trainer": {"strategy": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{}"]}}}},
    "expert": {
        "model": {
            "class_path": "visexpert.methods.ToVE",
            "init_args": {"experts": {"a": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{}"]}}}},
        }
    },
    "settings": {
        "model": {
            "class_path": "visexpert.methods.ToVE",
            "init_args": {"optimizer": {"class_path": "os.system", "init_args": {"command": "touch {}"}}},
        }
    },
}


@pytest.mark.parametrize("where", OTHERS)
def test_what_is_not_of_the_declared_type_is_refused_and_not_called(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file of one's own, too, whose classes are not looked at beforehand."""
    monkeypatch.setattr("sys.argv", ["visexpert"])
    marker = tmp_path / "called"
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OTHERS[where]).replace("{}", str(marker)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"subprocess|os\.system|posix"):
        parse_configs([shipped("tove/smoke"), path], [], command="plan")
    assert not marker.exists()
