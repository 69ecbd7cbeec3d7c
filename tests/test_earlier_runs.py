"""Runs of visexpert 0.1 are refused by every command in one sentence that says so; later ones bear their version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import visexpert
from visexpert.callbacks.phase import write_derived_config
from visexpert.callbacks.run_folder import SaveRunConfig
from visexpert.cli import main
from visexpert.errors import ConfigError
from visexpert.io.run_folder import version_of
from visexpert.runs import load_run

CLIP = {
    "class_path": "visexpert.vision.ClipEncoder",
    "init_args": {
        "source": None,
        "layer": -2,
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    },
}

LANGUAGE = {
    "class_path": "visexpert.language.CrossAttentionDecoder",
    "init_args": {"vocab_size": 96, "width": 32, "depth": 1, "heads": 2, "max_tokens": 48},
}

TOVE: dict[str, Any] = {
    "class_path": "visexpert.methods.ToVE",
    "init_args": {
        "clip": CLIP,
        "experts": {"depth": {"class_path": "visexpert.experts.TinyExpert", "init_args": {"source": "zoo:depth"}}},
        "language": LANGUAGE,
        "projector": "linear",
        "gate": "token",
        "gate_noise": "none",
        "feature_cache": None,
        "lr": 0.002,
        "caption_images": 8,
    },
}

MOVE_KD: dict[str, Any] = {
    "class_path": "visexpert.methods.MoVEKD",
    "init_args": {"clip": CLIP, "experts": {}, "language": LANGUAGE, "anchor_share": 0.3, "direction": "fixed"},
}

DATA = {"class_path": "visexpert.data.TabletopData", "init_args": {"num_train": 8, "mixture": None, "seed": 0}}
"""As 0.1 wrote it, with the classes and settings that it had."""


def old_run(folder: Path, model: dict[str, Any], *, header: str = "# lightning.pytorch==2.6.0\n") -> Path:
    """A finished run of visexpert 0.1, but for what its commands wrote beside."""
    config = {"seed_everything": 0, "model": model, "data": DATA, "run": str(folder)}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(header + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    weights = {"clip.model.x": torch.zeros(1)}
    torch.save({"state_dict": weights, "global_step": 8, "epoch": 0}, folder / "checkpoints" / "last.ckpt")
    return folder


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "test": lambda run: ["test", str(run)],
    "predict": lambda run: ["predict", str(run)],
    "caption": lambda run: ["caption", str(run), str(run / "image.png")],
    "merge": lambda run: ["merge", str(run)],
    "detach": lambda run: ["detach", str(run), "--keep", "1"],
    "export": lambda run: ["export", str(run), "--format", "hf", "--out", str(run / "out")],
    "plan": lambda run: ["plan", "--config", str(run / "config.yaml")],
    "extract": lambda run: ["extract", "plan", "--config", str(run / "config.yaml")],
    "data": lambda run: ["data", "check", str(run / "config.yaml")],
    "fit": lambda run: ["fit", "--config", str(run / "config.yaml"), "--run", str(run.parent / "new")],
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    return told


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_the_run_is_of_an_earlier_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("sys.argv", ["visexpert"])
    run = old_run(tmp_path / "old", TOVE)
    torch.save({}, run / "image.png")  # is not read before the run is
    told = refused(COMMANDS[command](run), capsys)
    assert f"{run}/config.yaml was written by an earlier version of visexpert (0.1)" in told
    assert visexpert.__version__ in told and told.endswith("train again, or use visexpert 0.1.")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", [TOVE, MOVE_KD], ids=["tove", "movekd"])
@pytest.mark.parametrize("header", ["# lightning.pytorch==2.6.0\n", ""], ids=["fit", "phase"])
def test_a_run_of_either_method_and_of_its_phases_is_refused(
    tmp_path: Path, model: dict[str, Any], header: str
) -> None:
    with pytest.raises(ConfigError, match=r"earlier version of visexpert \(0\.1\).*use visexpert 0\.1"):
        load_run(old_run(tmp_path / "old", model, header=header))


def test_a_run_of_this_version_keeps_the_error_that_it_has(tmp_path: Path) -> None:
    run = old_run(tmp_path / "mine", TOVE, header=f"# visexpert=={visexpert.__version__}\n")
    with pytest.raises(ConfigError, match="config.yaml: ") as told:
        load_run(run)
    assert "TinyExpert" in str(told.value) and "earlier" not in str(told.value)


def test_runs_and_their_phases_bear_the_version(tmp_path: Path) -> None:
    class Parser:
        def dump(self, config: str, **_: bool) -> str:
            return config

    config = yaml.safe_dump({"model": {"class_path": "x", "init_args": {"experts": {}}}, "data": {}})
    saved = SaveRunConfig(Parser(), config)
    saved.setup(Trainer(default_root_dir=tmp_path, logger=False, barebones=False, accelerator="cpu"), None, "fit")  # type: ignore[arg-type]
    write_derived_config(tmp_path, tmp_path / "merged", dict)
    for path in (tmp_path / "config.yaml", tmp_path / "merged" / "config.yaml"):
        assert version_of(path) == visexpert.__version__
