"""Runs and configurations of strangers run no code: a marker file says whether they did."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Callback

from tests.data.formats import write_shards
from visexpert import trust
from visexpert.cli import main
from visexpert.data import CC3M
from visexpert.errors import ConfigError, WeightsError
from visexpert.runs import load_run
from visexpert.training import VisexpertCLI
from visexpert.trust import Granted, grant, guarded, refuse_strangers, take

SMOKE = Path(__file__).parents[1] / "configs" / "tove" / "smoke.yaml"

MODULE = """
from pathlib import Path

from lightning.pytorch import Callback
from visexpert.tabletop import TinyExpert

Path({marker!r}).write_text("imported")


class MyExpert(TinyExpert):
    pass


class MyCallback(Callback):
    pass
"""


@pytest.fixture(autouse=True)
def _nothing_granted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["visexpert"])
    yield
    grant(Granted())


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What hostile code would write."""
    return tmp_path / "marker"


@pytest.fixture
def stranger(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported, and says that it was."""
    (tmp_path / "stranger.py").write_text(MODULE.format(marker=str(marker)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "stranger"
    sys.modules.pop("stranger", None)


class Runs:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def hostile(tmp_path: Path, *, change: dict[str, Any] | None = None, checkpoint: Any = None) -> Path:
    """A run's folder: the smoke configuration with some dotted settings replaced, and a checkpoint."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    for key, value in (change or {}).items():
        place = config
        *parents, last = key.split(".")
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    config["run"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    torch.save(
        {"state_dict": {}, "global_step": 0} if checkpoint is None else checkpoint, folder / "checkpoints/last.ckpt"
    )
    return folder


def parsed(**values: Any) -> Any:
    """What a parser returns."""
    return Namespace(**values)  # type: ignore[no-untyped-call]


def stop(cli: VisexpertCLI) -> None:
    """End a command when all is parsed and nothing is built."""
    raise SystemExit("parsed")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


ARGUMENTS = "model.init_args"

NAMED: dict[str, Any] = {
    f"{ARGUMENTS}.experts.semantic": {"class_path": "stranger.MyExpert", "init_args": {"arch": {"kind": "vit"}}},
    f"{ARGUMENTS}.clip": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARKER"]}},
    f"{ARGUMENTS}.language": {"class_path": "os.system", "init_args": {"command": "touch MARKER"}},
    f"{ARGUMENTS}.experts.depth.init_args.arch": {"class_path": "builtins.exec", "init_args": {"source": "1"}},
    "data": {"class_path": "visexpert.runs.torch.hub.load", "init_args": {"repo_or_dir": "x", "model": "y"}},
    "model": {"class_path": "visexpert.training.build_cli", "init_args": {"arguments": ["fit"]}},
    "data.dict_kwargs": {"template": [{"deep": {"class_path": "stranger.MyExpert"}}]},
}


@pytest.mark.parametrize("key", NAMED)
def test_a_class_of_a_run_from_elsewhere_is_refused(
    key: str, tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = yaml.safe_load(yaml.safe_dump(NAMED[key]).replace("MARKER", str(marker)))
    folder = hostile(tmp_path, change={key: value})
    name = next(part for part in yaml.safe_dump(value).split() if "." in part)
    with pytest.raises(ConfigError, match=f"config.yaml names '{name}'.*--trust"):
        load_run(folder)
    message = refused(["validate", str(folder)], capsys)
    assert f"names '{name}'" in message and "--trust" in message
    assert not marker.exists() and "stranger" not in sys.modules


@pytest.mark.parametrize("key", ["callbacks", "logger", "strategy", "profiler", "plugins", "accelerator"])
def test_a_part_of_a_foreign_trainer_is_refused(
    key: str, tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"class_path": "stranger.MyCallback", "init_args": {}}
    value = [named] if key in ("callbacks", "plugins", "logger") else named
    folder = hostile(tmp_path, change={f"trainer.{key}": value})
    for command in ("validate", "test", "predict"):
        assert "names 'stranger.MyCallback'" in refused([command, str(folder)], capsys)
    assert "names 'stranger.MyCallback'" in refused(["plan", "--config", str(folder / "config.yaml")], capsys)
    assert not marker.exists()


COMMANDS = {
    "detach": ["RUN", "--keep", "1"],
    "merge": ["RUN"],
    "caption": ["RUN", "IMAGE"],
    "serve": ["RUN"],
    "plan": ["--config", "RUN/config.yaml"],
    "extract": ["--config", "RUN/config.yaml"],
    "data": ["check", "RUN/config.yaml"],
    "export": ["RUN", "--format", "hf", "--out", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_that_opens_a_run_refuses(
    command: str, tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        pytest.importorskip("gradio", reason="the page needs the extra app")
    (tmp_path / "a.png").write_bytes(b"")
    part = {"class_path": "stranger.MyExpert"}
    change = {f"{ARGUMENTS}.experts.semantic": part, "data.init_args.root": part}
    folder = hostile(tmp_path, change=change, checkpoint={"state_dict": {"clip.x": torch.zeros(1)}, "global_step": 0})
    places = {"RUN": str(folder), "IMAGE": str(tmp_path / "a.png"), "OUT": str(tmp_path / "out")}
    arguments = [command, *COMMANDS[command]]
    for word, place in places.items():
        arguments = [part.replace(word, place) for part in arguments]
    assert "names 'stranger.MyExpert'" in refused(arguments, capsys)
    assert not marker.exists()


def test_a_comparison_reads_a_foreign_configuration_as_plain_values(tmp_path: Path, marker: Path) -> None:
    folder = hostile(tmp_path)
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {marker}']", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["compare", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError):
        load_run(folder)
    with pytest.raises(SystemExit):
        main(["validate", str(folder)])
    assert not marker.exists()


def test_a_part_in_another_file_is_looked_at(
    tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("class_path: stranger.MyExpert\ninit_args: {arch: {kind: vit}}\n", encoding="utf-8")
    folder = hostile(tmp_path, change={f"{ARGUMENTS}.experts.semantic": str(part)})
    with pytest.raises(ConfigError):
        load_run(folder)
    refused(["validate", str(folder)], capsys)
    assert not marker.exists()


HIDDEN: dict[str, dict[str, Any]] = {
    "text": {f"{ARGUMENTS}.language": "stranger.MyExpert"},
    "text in a mapping": {f"{ARGUMENTS}.experts.semantic": "stranger.MyExpert"},
    "interpolation": {"run": "stranger.MyExpert", f"{ARGUMENTS}.language": {"class_path": "${run}"}},
    "file that names a file": {f"{ARGUMENTS}.language": "sub/part.yaml"},
    "large file": {f"{ARGUMENTS}.language": "large.yaml"},
    "model": {"model": "stranger.MyExpert"},
    "data": {"data": "stranger.MyExpert"},
    "callback": {"trainer.callbacks": ["stranger.MyCallback"]},
    "logger": {"trainer.logger": "stranger.MyCallback"},
    "plugin": {"trainer.plugins": ["stranger.MyCallback"]},
}


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("command", ["validate", "plan", "data", "caption"])
def test_to_name_a_class_in_other_ways_imports_nothing(
    kind: str, command: str, tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hostile(tmp_path, change=HIDDEN[kind])
    if kind == "interpolation":
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        (folder / "config.yaml").write_text(text.replace(f"run: {folder}", "run: stranger.MyExpert"), encoding="utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "part.yaml").write_text("class_path: stranger.MyExpert\n", encoding="utf-8")
    (folder / "large.yaml").write_text(f"# {'x' * 1_000_000}\nclass_path: stranger.MyExpert\n", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"")
    arguments = {
        "validate": ["validate", str(folder)],
        "plan": ["plan", "--config", str(folder / "config.yaml")],
        "data": ["data", "check", str(folder / "config.yaml")],
        "caption": ["caption", str(folder), str(tmp_path / "a.png")],
    }[command]
    with pytest.raises(SystemExit):
        main(arguments)
        raise SystemExit(0)  # some commands have no need of some parts
    assert not marker.exists() and "stranger" not in sys.modules
    if kind == "text" and command != "data":  # which builds what has a class_path
        assert "names 'stranger.MyExpert'" in capsys.readouterr().err


def test_what_a_stranger_may_not_name_one_may_oneself(tmp_path: Path, marker: Path, stranger: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    path = Path("config.yaml")
    with pytest.raises(ConfigError, match="names 'stranger.MyCallback'.*--trust stranger"), guarded(path):
        parser.parse_object({"callback": "stranger.MyCallback"})
    assert not marker.exists()
    with guarded(path):
        parser.parse_object({"callback": "lightning.pytorch.callbacks.Timer"})
    with guarded(path, trust=["stranger"]):
        parser.parse_object({"callback": "stranger.MyCallback"})
    with guarded(path), pytest.raises(ArgumentError):
        parser.parse_object({"callback": "stranger.MyCallback"})
    parser.parse_object({"callback": "stranger.MyCallback"})  # nothing of it stays


def test_what_a_parser_has_looked_up_is_looked_at() -> None:
    path = Path("config.yaml")
    for value in (os.system, subprocess.Popen, eval, pickle.loads):
        with pytest.raises(ConfigError, match="could run anything"):
            refuse_strangers(parsed(a=[{"b": parsed(c=value)}]), path)
    with pytest.raises(ConfigError, match=r"names 'posix.system'|names 'nt.system'"):
        refuse_strangers({"a": os.system}, path)
    refuse_strangers(parsed(a=1, b=["text", None, 2.0, Path("x"), torch.float32]), path)


@pytest.mark.parametrize(
    "class_path",
    [
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.profilers.SimpleProfiler",
        "visexpert.callbacks.ExpertDetachment",
        "visexpert.tabletop.zoo.ship.ShipWeights",
        "visexpert.language.LlavaTemplate",
    ],
)
def test_what_runs_name_of_their_own_is_accepted(class_path: str) -> None:
    refuse_strangers({"trainer": {"callbacks": [{"class_path": class_path}]}}, Path("config.yaml"))


@pytest.mark.parametrize(
    "class_path",
    [
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.callbacks.model_checkpoint.os.system",
        "torch.hub.load",
        "torch.load",
        "transformers.AutoModel.from_pretrained",
        "visexpert.cli.main",
        "visexpert.training.VisexpertCLI",
        "visexpert.callbacks.run_folder.subprocess.Popen",
        "visexpertise.Evil",
        "functools.partial",
    ],
)
def test_what_no_run_needs_is_refused(class_path: str) -> None:
    with pytest.raises(ConfigError, match="--trust"):
        refuse_strangers({"class_path": class_path}, Path("config.yaml"))


def test_the_module_that_the_user_names_is_trusted_and_no_other(tmp_path: Path, marker: Path, stranger: str) -> None:
    named = {"class_path": "stranger.MyExpert"}
    refuse_strangers(named, Path("config.yaml"), trust=["stranger"])
    assert marker.exists()
    for other in ("strange", "stranger.inner", "os"):
        with pytest.raises(ConfigError):
            refuse_strangers(named, Path("config.yaml"), trust=[other])
    with pytest.raises(ConfigError):  # what it imports is not its own
        refuse_strangers({"class_path": "stranger.Path"}, Path("config.yaml"), trust=["stranger"])
    grant(take(["test", "--trust", "stranger"])[1])
    refuse_strangers(named, Path("config.yaml"))


def test_trust_goes_from_the_command_line_to_the_run(
    tmp_path: Path, marker: Path, stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = {"kind": "vit", "image_size": 48, "network": {"patch_size": 12, "token_dim": 24, "depth": 1, "num_heads": 2}}
    expert = {"class_path": "stranger.MyExpert", "init_args": {"arch": arch}}
    folder = hostile(tmp_path, change={f"{ARGUMENTS}.experts.semantic": expert})
    message = refused(["detach", str(folder), "--keep", "1", "--trust", "stranger"], capsys)
    assert "does not fit" in message and marker.exists()  # past the classes, and at the empty checkpoint
    with pytest.raises(WeightsError, match="does not fit"):
        load_run(folder, trust=["stranger"])


def test_a_fit_trusts_the_configuration_that_its_user_gives(
    tmp_path: Path, marker: Path, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tmp_path, change={"trainer.callbacks": [{"class_path": "stranger.MyCallback"}]})
    monkeypatch.setattr(VisexpertCLI, "instantiate_classes", stop)
    with pytest.raises(SystemExit, match="parsed"):
        main(["fit", "--config", str(folder / "config.yaml"), "--run", str(tmp_path / "mine")])
    assert marker.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("where", ["file", "line"])
def test_a_checkpoint_never_runs_code(
    command: str, where: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"state_dict": {}, "global_step": 1, "x": Runs(f"touch {marker}")}
    folder = hostile(tmp_path, change={"weights_only": False} if where == "file" else {}, checkpoint=bad)
    arguments = [command, *["--run"] * (command == "fit"), str(folder)]
    arguments += ["--config", str(folder / "config.yaml"), "--ckpt_path", "last"] if command == "fit" else []
    arguments += ["--weights_only", "false"] if where == "line" else []
    refused(arguments, capsys)
    assert not marker.exists()
    torch.save({"state_dict": {}, "global_step": 1}, folder / "checkpoints/last.ckpt")
    assert "weights_only is False" in refused(arguments, capsys)


def test_a_shard_that_is_a_command_needs_the_flag(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "sizes.json").write_text('{"00000.tar": 3}', encoding="utf-8")
    shard = f"pipe:touch {marker}; cat {tmp_path}/00000.tar"
    sizes = str(tmp_path / "sizes.json")
    data = {"class_path": "visexpert.data.CC3M", "init_args": {"train": shard, "val": shard, "sizes": sizes}}
    folder = hostile(tmp_path, change={"data": data, "allow_pipe": True})
    assert "allow_pipe" in refused(["validate", str(folder)], capsys)
    folder.rename(tmp_path / "first")
    folder = hostile(tmp_path, change={"data": data})
    assert "--allow_pipe true" in refused(["validate", str(folder)], capsys)
    with pytest.raises(ConfigError, match="--allow_pipe true"):
        CC3M(train=shard, val=shard, sizes=sizes).prepare_data()
    assert not marker.exists()
    grant(Granted(pipe=True))
    CC3M(train=shard, val=shard, sizes=sizes).prepare_data()


def test_what_is_granted_is_for_one_command() -> None:
    left, granted = take(["test", "--trust", "a", "r", "--trust=b.c", "--allow_pipe", "true"])
    assert left == ["test", "r"] and granted == Granted(("a", "b.c"), pipe=True)
    grant(granted)
    assert trust.pipe_allowed()
    grant(take(["test", "--allow_pipe=false"])[1])
    assert not trust.pipe_allowed() and trust.PIPE not in os.environ
    for wrong in (["--trust"], ["--trust", "--run"], ["--allow_pipe", "perhaps"], ["--allow_pipe"]):
        with pytest.raises(ConfigError, match=wrong[0]):
            take(["test", *wrong])


def test_a_checkpoint_cannot_change_the_configuration(
    tmp_path: Path, marker: Path, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's command line lays ``hyper_parameters`` of a checkpoint over what was parsed."""
    told = {"_class_path": "stranger.MyExpert", "gate": {"balance_weight": 77.0}}
    folder = hostile(tmp_path, checkpoint={"state_dict": {}, "global_step": 0, "hyper_parameters": told})
    seen: list[Any] = []

    def look(cli: VisexpertCLI) -> None:
        seen.append(cli.config.as_dict())
        stop(cli)

    monkeypatch.setattr(VisexpertCLI, "instantiate_classes", look)
    with pytest.raises(SystemExit, match="parsed"):
        main(["validate", str(folder)])
    assert seen[0]["validate"]["model"]["init_args"]["gate"]["balance_weight"] == 0.01 and not marker.exists()
