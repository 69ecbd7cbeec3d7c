"""The commands in the headers of the files under configs/ run to their end, in the order in which they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from tests.tiny_configs import CONFIGS, STEPS, write_configs, write_data, write_models
from visexpert.cli import main

Command = tuple[str, ...]

ROOT = CONFIGS.parent
AMID = re.compile(r"(?<!`)visexpert (fit|test|merge|detach|export)")
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def header(name: str) -> list[str]:
    """The comment lines at the head of a file, without their mark."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[1:].strip() for line in lines[:end]]


def commands_of(name: str) -> list[Command]:
    """Arguments of each command that has lines of its own, which go on after a backslash."""
    lines = "\n".join(header(name)).replace("\\\n", " ").splitlines()
    return [tuple(shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("visexpert ")]


HEADERS = {name: commands for name in FILES if (commands := commands_of(name))}
COMMANDS = list(dict.fromkeys(command for commands in HEADERS.values() for command in commands))


def option(command: Command, name: str) -> str | None:
    """The value of an option that is given apart (``--run runs/x``)."""
    return command[command.index(name) + 1] if name in command else None


def layered(command: Command, *keys: str) -> Any:
    """A setting as the files of a command have it, the last one first."""
    names = [value for flag, value in zip(command, command[1:], strict=False) if flag == "--config"]
    for name in reversed(names):
        value = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def made_by(command: Command) -> str | None:
    """The folder that a command makes."""
    if command[0] == "fit":
        return option(command, "--run") or str(layered(command, "run"))
    if command[0] in ("merge", "detach"):
        return f"{command[1]}/{option(command, '--name') or {'merge': 'merged', 'detach': 'detached'}[command[0]]}"
    return option(command, "--out")


def needed_by(command: Command) -> str | None:
    """The run that a command goes on from."""
    if command[0] != "fit":
        return option(command, "--run") or command[1]
    start = option(command, "--model.init_args.init_from") or layered(command, "model", "init_args", "init_from")
    return None if start is None else str(Path(start).parents[1])


MAKERS = {made: command for command in COMMANDS if (made := made_by(command)) is not None}


def is_overlay(name: str) -> bool:
    return "class_path" not in yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")).get("model", {})


def test_what_is_no_overlay_says_how_it_is_run() -> None:
    folders = ("distill/", "movekd/", "tove/", "hybrid/", "hubs/", "zoo/")
    whole = {name for name in FILES if name.startswith(folders) and not is_overlay(name)}
    assert len(whole) > 20 and whole <= set(HEADERS)
    for name in FILES:
        if name.startswith(("hybrid/", "hubs/")):
            assert name in HEADERS
        own = f"configs/{name}"
        assert name not in HEADERS or any(own in command for command in HEADERS[name]), name


def test_no_command_stands_amid_a_sentence() -> None:
    """So that those that are run are all that there are; names of commands in backquotes are none."""
    for name in FILES:
        for line in header(name):
            assert line.startswith("visexpert ") or not AMID.search(line)


def test_commands_fit_each_other() -> None:
    """In one folder, none writes where another has, and what one starts from, another makes."""
    made = [made_by(command) for command in COMMANDS]
    assert len(MAKERS) == len([folder for folder in made if folder is not None])
    for command in COMMANDS:
        needed = needed_by(command)
        assert needed is None or needed in MAKERS, command


def shortened(command: Command) -> list[str]:
    """The command with few steps, where it has or would take many."""
    if command[0] not in SHORT:
        return list(command)
    steps, others = SHORT[command[0]]
    found = [str(STEPS) if flag == steps else word for flag, word in zip(("", *command), command, strict=False)]
    return [*found, *(() if steps in command else (steps, str(STEPS))), *others]


SHORT = {
    "merge": ("--steps", ("--optimizer.warmup_steps", "1")),
    "detach": ("--retune_steps", ("--timing_seconds", "0.01", "--timing_images", "1")),
}
"""Of commands that train by themselves, the option for their steps, and what else takes long."""


class Walk:
    """Runs each command once, what it goes on from before it."""

    def __init__(self) -> None:
        self.done: set[Command] = set()

    def run(self, command: Command) -> None:
        needed = needed_by(command)
        if needed is not None:
            self.run_once(MAKERS[needed])
        self.run_once(command)

    def run_once(self, command: Command) -> None:
        if command in self.done:
            return
        self.done.add(command)
        needed = needed_by(command)
        if needed is not None:
            self.run_once(MAKERS[needed])
        main(shortened(command))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """A folder with configs/, data/ and models of tiny size, which is the working directory."""
    root = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(root / "cache"))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(sys, "argv", ["visexpert"])
        write_data(root / "data")
        write_configs(root, write_models(root / "models"))
        (root / "src" / "visexpert").mkdir(parents=True)  # what configs/zoo writes goes into a checkout
        patch.chdir(root)
        yield Walk()


@pytest.mark.parametrize("name", HEADERS)
def test_a_header(name: str, walk: Walk) -> None:
    for command in HEADERS[name]:
        walk.run(command)
        made = made_by(command)
        if command[0] in ("fit", "merge", "detach"):
            assert made is not None
            read_run(Path(made))
            if command[0] == "detach":
                found = json.loads((Path(made) / "detachment.json").read_text(encoding="utf-8"))
                assert all(score["score"] == -score["loss"] for score in found["scores"])  # captions have no accuracy
        elif command[0] == "export":
            assert made is not None
            READERS[option(command, "--format") or ""](Path(made))


def read_run(run: Path) -> None:
    """A run that trained, with finite weights and scores."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= STEPS
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert scores if config["test_after_fit"] else True
    assert all(np.isfinite(value) for value in scores.values() if value is not None)


def read_hf(folder: Path) -> None:
    clip = CLIPVisionModel.from_pretrained(folder).eval()
    side = clip.config.image_size
    with torch.no_grad():
        tokens_BTD = clip(torch.rand(1, 3, side, side)).last_hidden_state
    assert tokens_BTD.shape[1] == (side // clip.config.patch_size) ** 2 + 1 and tokens_BTD.isfinite().all()


def read_onnx(folder: Path) -> None:
    from onnxruntime import InferenceSession

    (path,) = folder.glob("*.onnx")
    session = InferenceSession(path)
    (given,) = session.get_inputs()
    side = int(given.shape[-1])
    outputs = session.run(None, {given.name: np.zeros((1, 3, side, side), dtype=np.float32)})
    assert all(np.isfinite(np.asarray(output)).all() for output in outputs)


def read_llava(folder: Path) -> None:
    """It is a LLaVA that transformers reads, and it writes."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    opening = processor.tokenizer.bos_token
    image = Image.new("RGB", (40, 30), "green")
    given = processor(images=image, text=f"<image>{opening}what is it?", add_special_tokens=False, return_tensors="pt")
    num_image = int((given["input_ids"] == model.config.image_token_index).sum())
    assert num_image == (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    with torch.no_grad():
        ids_BN = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        first_V = model(**given).logits[0, -1]
    written = ids_BN[0, given["input_ids"].shape[1] :]
    assert len(written) == 4 and model.config.image_token_index not in written
    banned = model.generation_config.eos_token_id
    assert written[0] == first_V.index_fill(0, torch.tensor([banned]), -torch.inf).argmax()


READERS = {"hf": read_hf, "onnx": read_onnx, "llava": read_llava}


def arguments_of(commands: Sequence[Command]) -> set[str]:
    return {command[0] for command in commands}


def test_each_kind_of_command_is_among_them() -> None:
    assert arguments_of(COMMANDS) == {"fit", "test", "merge", "detach", "export"}
    formats = [option(command, "--format") for command in COMMANDS if command[0] == "export"]
    assert formats.count("llava") >= 2 and set(formats) == set(READERS)
