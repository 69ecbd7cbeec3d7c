"""Every file under configs/ trains two steps: its own precision, strategy, clipping, accumulation and callbacks.

As the commands in its header say, to their end; a file without any is laid over the base that it is for. What is
replaced is said in tests/shipped_runs.py.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.exports_read import READERS
from tests.header_commands import COMMANDS, FILES, HEADERS, MAKERS, Command, files_of, made_by, option
from tests.shipped_runs import NORM, STEPS, Run, ShippedRuns, Watch
from tests.test_configs import base_of, before, is_overlay


def fit(name: str, *files: str, start: str | None = None) -> Command:
    """The command that trains these files, the way headers have it, into a folder of that name."""
    configs = [part for file in files for part in ("--config", f"configs/{file}")]
    init_from = [] if start is None else ["--model.init_args.init_from", f"runs/others/{start}/checkpoints/last.ckpt"]
    return ("fit", *configs, "--run", f"runs/others/{name}", *init_from, "--test_after_fit", "false")


TOLD = {file for command in COMMANDS if command[0] == "fit" for file in files_of(command)}
"""Files that a command of a header trains."""

OTHERS = {
    name: fit(name.removesuffix(".yaml"), *((*base_of(name), *before(name)) if is_overlay(name) else ()), name)
    for name in FILES
    if name not in TOLD
}
"""Of the other files, a command that trains them; released.yaml is for the papers' scale, too."""

TEACHERS, RELEASED = "hubs/movekd-v1.0.yaml", "movekd/released.yaml"
for stage, start in ((1, None), (2, "released-1")):
    files = (f"movekd/llava/stage{stage}.yaml", TEACHERS, RELEASED)
    OTHERS[f"released over stage {stage}"] = fit(f"released-{stage}", *files, start=start)

ROWS = [name for name in OTHERS if "/ablations/" in name]

ALONE = ("depth", "edges", "normals", "segmentation", "semantic", "semantic64", "top1")
UNMOVED = {f"tove/ablations/{name}.yaml": {"gate (no decay)"} for name in ALONE}
"""Groups that get no gradient: the gate of one expert, or of one kept, is 1 whatever its logits; the rest decays."""

UNMEASURED = "variance_start"
"""What is no number until it is measured, which nothing does without distillation."""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShippedRuns]:
    with pytest.MonkeyPatch.context() as patch:
        makers = {made: command for command in OTHERS.values() if (made := made_by(command)) is not None}
        yield ShippedRuns(tmp_path_factory.mktemp("shipped"), patch, MAKERS | makers)


def check_steps(name: str, losses: Collection[float], watch: Watch, clip: float | None) -> None:
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert len(watch.norms) == STEPS
    for norm in watch.norms:
        assert norm == pytest.approx(clip, rel=1e-2) if clip else 1.0 < norm <= NORM * 1.01
    still = {key for key, group in watch.groups.items() if group.lr > 0 and not group.moved}
    assert watch.groups and still == UNMOVED.get(name, set())
    assert sorted(watch.changed) == []


def check_fit(command: Command, shipped: ShippedRuns) -> None:
    """Two steps as configured, and a folder with finite weights and scores."""
    run = shipped.run(command)
    assert run.steps == STEPS and run.finished
    check_steps(files_of(command)[-1], losses_of(run), run.watch, run.clip)
    read_run(run.folder)
    assert [phase for phase in run.phases if not (run.folder / phase / "metrics.json").is_file()] == []
    first, *overlays = files_of(command)
    assert not overlays or differ(shipped, command, ("fit", "--config", f"configs/{first}"))


def losses_of(run: Run) -> list[float]:
    with (run.folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [float(value) for row in rows for key, value in row.items() if "loss" in key and value]


def read_run(run: Path) -> None:
    """A run that trained, with finite weights and scores."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= STEPS
    weights = {name: value for name, value in checkpoint["state_dict"].items() if UNMEASURED not in name}
    assert [name for name, value in weights.items() if not value.isfinite().all()] == []
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert scores if config["test_after_fit"] else True
    assert all(np.isfinite(value) for value in scores.values() if value is not None)


def differ(shipped: ShippedRuns, command: Command, other: Command) -> bool:
    """Whether two fits have different settings, beside where they write and what follows."""
    one, two = ({**shipped.settings(each), "run": None, "test_after_fit": None} for each in (command, other))
    return one != two


@pytest.mark.parametrize("name", HEADERS)
def test_the_commands_of_every_header(name: str, shipped: ShippedRuns) -> None:
    """In the order in which they stand there, each after what it goes on from."""
    for command in HEADERS[name]:
        shipped.carry_out(command)
        made = Path(made_by(command) or "")
        if command[0] == "fit":
            check_fit(command, shipped)
        elif command[0] in ("merge", "detach"):
            read_run(made)
        elif command[0] == "export":
            READERS[option(command, "--format") or ""](made)
        if command[0] == "detach":
            found = json.loads((made / "detachment.json").read_text(encoding="utf-8"))
            assert all(score["score"] == -score["loss"] for score in found["scores"])  # captions have no accuracy


@pytest.mark.parametrize("name", OTHERS)
def test_two_steps_of_every_other_file(name: str, shipped: ShippedRuns) -> None:
    """In a whole run; of a row of ablations that differs from such a run in the model alone, the steps."""
    command = OTHERS[name]
    assert shipped.settings(command)["trainer"]["max_steps"] > 0
    if name in ROWS and shipped.is_known(command):
        first = files_of(command)[0]
        assert differ(shipped, command, ("fit", "--config", f"configs/{first}"))  # some repeat what a file between says
        steps = shipped.steps(command)
        check_steps(name, steps.losses.values(), steps.watch, steps.clip)
    else:
        check_fit(command, shipped)


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_a_whole_run_of_every_row_of_ablations(name: str, shipped: ShippedRuns) -> None:
    check_fit(OTHERS[name], shipped)
