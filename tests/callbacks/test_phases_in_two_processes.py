"""Detachment and merging by two processes: what they find, train and write is what one does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from tests.methods.helpers import bare_trainer, shake, tiny_tove
from tests.tabletop.quiet import QUIET
from tests.two_processes import in_two_processes
from visexpert.callbacks import ExpertDetachment, KnowledgeMerging
from visexpert.callbacks.phase import Phase, PhaseSettings
from visexpert.errors import ConfigError
from visexpert.io.run_folder import hold
from visexpert.methods import MergingOptimizer, ToVE
from visexpert.tabletop import TabletopData

PHASES: dict[str, Phase] = {
    "detached": ExpertDetachment(keep=2, timing_images=1, timing_seconds=0.0, retune_steps=2, retune_lr=1e-3),
    "merged": KnowledgeMerging(steps=2, optimizer=MergingOptimizer(lr=1e-3, warmup_steps=0)),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PL_GLOBAL_SEED", "3")
        yield


def scenes(*, batch_size: int) -> TabletopData:
    sizes: dict[str, Any] = {
        "num_train": 8,
        "num_val": 6,
        "num_test": 3,
        "batch_size": batch_size,
        "eval_batch_size": 2,
    }
    return TabletopData(rendering=QUIET, **sizes)


def trained() -> ToVE:
    model = shake(tiny_tove(caption_images=1, meteor=False))
    model.mark_loaded()
    return model


def carried_out(name: str, folder: Path, *, batch_size: int, devices: int = 1) -> Path:
    settings = PhaseSettings(accelerator="cpu", devices=devices, log_every_n_steps=1)
    return PHASES[name].carry_out(trained(), scenes(batch_size=batch_size), folder, settings)


def work(rank: int, folder: Path) -> dict[str, Path]:
    return {name: carried_out(name, folder, batch_size=2, devices=2) for name in PHASES}


@pytest.fixture(scope="module")
def together(cache: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    first, second = in_two_processes(work, tmp_path_factory.mktemp("together"))
    assert first == second
    return first


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def weights(out: Path) -> dict[str, Tensor]:
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


@pytest.mark.parametrize("name", PHASES)
def test_two_processes_leave_what_one_leaves(tmp_path: Path, together: dict[str, Path], name: str) -> None:
    alone = carried_out(name, tmp_path, batch_size=4)
    scores, expected = (
        {key: value for key, value in read(out / "metrics.json").items() if key.startswith(("test/", "val/"))}
        for out in (together[name], alone)
    )
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(scores) > 5
    found, wanted = weights(together[name]), weights(alone)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if not key.endswith(("k_proj.bias", "key_value.bias")):  # whose gradient is 0 but for rounding
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=key)
    assert sorted(path.name for path in together[name].iterdir()) == sorted(path.name for path in alone.iterdir())
    assert [path.name for path in (together[name] / "checkpoints").iterdir()] == ["last.ckpt"]


def test_subsets_are_scored_as_by_one(tmp_path: Path, together: dict[str, Path]) -> None:
    found, expected = (
        read(out / "detachment.json") for out in (together["detached"], carried_out("detached", tmp_path, batch_size=4))
    )
    assert found["kept"] == expected["kept"] and found["images"] == expected["images"] == 6
    assert found["gate_mass"] == pytest.approx(expected["gate_mass"], rel=1e-5)
    for row, wanted in zip(found["scores"], expected["scores"], strict=True):
        assert row["experts"] == wanted["experts"]
        assert [row["loss"], row["gflop"]] == pytest.approx([wanted["loss"], wanted["gflop"]], rel=1e-5)
        assert row["milliseconds"] > 0


def after_a_fit(rank: int, folder: Path) -> tuple[bool, str]:
    """A fit with a phase behind it, which a second one finds finished; one in a folder that is held."""
    phase = KnowledgeMerging(steps=1, test=False)
    trainer = bare_trainer(folder, steps=1, callbacks=[phase], devices=2, strategy="ddp", enable_checkpointing=False)
    trainer.fit(trained(), datamodule=scenes(batch_size=2))
    finished = (folder / "merged" / "checkpoints" / "last.ckpt").is_file()
    try:
        if rank == 0:
            with hold(folder, "merged"):
                carried_out("merged", folder, batch_size=2, devices=2)
        else:
            carried_out("merged", folder, batch_size=2, devices=2)
    except ConfigError as error:
        return finished, str(error)
    return finished, ""


def test_a_phase_follows_a_fit_and_all_processes_tell_what_the_first_finds(tmp_path: Path) -> None:
    for finished, told in in_two_processes(after_a_fit, tmp_path):
        assert finished
        assert "Another visexpert process is writing" in told


def test_a_model_that_is_split_over_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bare_trainer(tmp_path, steps=1)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(ConfigError, match="FSDPStrategy splits it; remove the callback"):
        KnowledgeMerging(steps=1)._fitting(trainer, trained())


@pytest.mark.long
def test_a_command_starts_the_other_process_by_itself(tmp_path: Path) -> None:
    def visexpert(*words: str) -> str:
        command = [sys.executable, "-m", "visexpert.cli", *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300, text=True).stdout

    run = tmp_path / "run"
    visexpert("fit", "--config", "tove/smoke", "--run", str(run), "--test_after_fit", "false")
    told = visexpert("merge", str(run), "--steps", "2", "--devices", "2")
    assert told.count("Merged in 2 steps") == told.count("Done: ") == 1
    assert {stage["processes"] for stage in read(run / "merged" / "environment.json").values()} == {2}
