"""Checkpoints that are folders, put together without running code from them."""

from __future__ import annotations

import os
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.sharded_parts import as_deepspeed, as_fsdp
from visexpert.errors import WeightsError
from visexpert.io.checkpoints import checked_checkpoint, load_checkpoint

ZERO3 = Path(__file__).parent / "zero3"
"""Written by DeepSpeed 0.19 in two processes, third stage; in it what the engine gathered from its weights."""


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"clip.weight": torch.randn(5, 3), "gate.bias": torch.randn(2).bfloat16(), "scale": torch.tensor(3)}


@pytest.fixture
def file(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    optimizer = {"param_groups": [{"lr": 0.1, "params": [0], "name": "clip"}], "state": {}}
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1, "optimizer_states": [optimizer]}, path)
    return path


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_a_folder_of_fsdp_gives_the_weights_and_facts(tmp_path: Path, file: Path, state: dict[str, Tensor]) -> None:
    folder = as_fsdp(file, tmp_path / "last.ckpt")
    checkpoint = load_checkpoint(folder, owner="test")
    same(checkpoint["state_dict"], state)
    assert (checkpoint["global_step"], checkpoint["epoch"]) == (7, 1)
    assert checked_checkpoint(folder, owner="test") == 7


def test_a_folder_of_deepspeed_is_read_by_its_tool_for_weights_alone(
    tmp_path: Path, file: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_deepspeed(file, tmp_path / "last.ckpt", monkeypatch)
    checkpoint = load_checkpoint(folder, owner="test")
    same(checkpoint["state_dict"], state)
    assert checkpoint["global_step"] == 7 and "ds_config" not in checkpoint
    assert checked_checkpoint(folder, owner="test") == 7
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_the_engine_s_own_folder_gives_what_the_engine_gathered() -> None:
    checkpoint = load_checkpoint(ZERO3, owner="test")
    same(checkpoint["state_dict"], load_file(ZERO3 / "gathered.safetensors"))
    assert checkpoint["global_step"] == 2


def test_facts_of_the_engine_s_own_folder_need_no_engine() -> None:
    assert checked_checkpoint(ZERO3, owner="test") == 2


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is here")
def test_where_deepspeed_is_missing_the_error_says_so() -> None:
    with pytest.raises(WeightsError, match=r"visexpert\[deepspeed\]"):
        load_checkpoint(ZERO3, owner="test")


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_a_damaged_folder_of_fsdp_is_refused(tmp_path: Path, file: Path, victim: str, harm: str) -> None:
    folder = as_fsdp(file, tmp_path / "last.ckpt")
    damage(folder / victim, harm)
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        checked_checkpoint(folder, owner="test")
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        load_checkpoint(folder, owner="test")


@pytest.mark.parametrize("victim", ["zero_pp_rank_1_mp_rank_00_optim", "zero_pp_rank_0_mp_rank_00_model"])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_a_damaged_folder_of_deepspeed_is_refused(tmp_path: Path, victim: str, harm: str) -> None:
    folder = tmp_path / "last.ckpt"
    shutil.copytree(ZERO3, folder)
    damage(folder / "checkpoint" / f"{victim}_states.pt", harm)
    if harm == "missing" and "model" in victim:
        damage(folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_model_states.pt", harm)
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        checked_checkpoint(folder, owner="test")


@pytest.mark.parametrize("tag", ["", "../elsewhere", "gone"])
def test_a_tag_that_is_no_folder_is_refused(tmp_path: Path, tag: str) -> None:
    folder = tmp_path / "last.ckpt"
    shutil.copytree(ZERO3, folder)
    (folder / "latest").write_text(tag, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        checked_checkpoint(folder, owner="test")


@pytest.mark.parametrize("victim", [".metadata", "meta.pt"])
def test_no_code_of_an_fsdp_folder_runs(tmp_path: Path, file: Path, victim: str) -> None:
    folder = as_fsdp(file, tmp_path / "last.ckpt")
    if victim == "meta.pt":
        torch.save({"global_step": Attack(tmp_path / "ran")}, folder / victim)
    else:
        (folder / victim).write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        load_checkpoint(folder, owner="test")
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_deepspeed_folder_runs(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_deepspeed(file, tmp_path / "last.ckpt", monkeypatch)
    shard = folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"fp32": Attack(tmp_path / "ran")}}, shard)
    for read in (load_checkpoint, checked_checkpoint):
        with pytest.raises(WeightsError, match="mkdir"):
            read(folder, owner="test")
    monkeypatch.setattr(
        "visexpert.io.sharded.read_facts", lambda folder: {"global_step": 1}
    )  # the second line of defense
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        load_checkpoint(folder, owner="test")
    assert not (tmp_path / "ran").exists()


def damage(path: Path, harm: str) -> None:
    if harm == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
