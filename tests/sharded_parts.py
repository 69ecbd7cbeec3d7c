"""Checkpoints in the forms of engines that save shards, made from the file of a plain run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save


def as_fsdp(file: Path, folder: Path) -> Path:
    """Write a folder as Lightning's FSDPStrategy does: shards and index by torch's own writer, the rest beside them."""
    checkpoint = torch.load(file, weights_only=True)
    states = {"model": checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", ())):
        states[f"optimizer_{number}"] = {"param_groups": state["param_groups"]}
    save(states, checkpoint_id=folder)
    torch.save(checkpoint, folder / "meta.pt")
    return folder


def as_deepspeed(file: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write a folder with DeepSpeed's files and entries, and put a tool in place that reads it in DeepSpeed's stead.

    The tool asks for code to be run, as DeepSpeed's does.
    """
    checkpoint = torch.load(file, weights_only=True)
    state = checkpoint.pop("state_dict")
    checkpoint.pop("optimizer_states", None)
    shards = folder / "checkpoint"
    shards.mkdir(parents=True)
    engine = {"module": {}, "buffer_names": [], "ds_config": {}, "ds_version": "0", "dp_world_size": 1}
    torch.save({**engine, **checkpoint}, shards / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"fp32": state}}, shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("checkpoint", encoding="utf-8")

    def read(path: str) -> dict[str, Tensor]:
        tag = (Path(path) / "latest").read_text(encoding="utf-8")
        file = Path(path, tag, "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        weights: dict[str, Tensor] = torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32"]
        return weights

    names = ("LossScaler", "DynamicLossScaler", "ZeroStageEnum", "fragment_address")
    modules: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        "deepspeed.runtime": {},
        "deepspeed.runtime.fp16": {},
        "deepspeed.runtime.zero": {},
        "deepspeed.utils": {},
        "deepspeed.runtime.fp16.loss_scaler": {},
        "deepspeed.runtime.zero.config": {},
        "deepspeed.utils.tensor_fragment": {},
        "deepspeed.utils.zero_to_fp32": {"get_fp32_state_dict_from_zero_checkpoint": read},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        for entry, value in {**content, **{each: type(each, (), {}) for each in names}}.items():
            setattr(module, entry, value)
        patch.setitem(sys.modules, name, module)
    return folder


def copy_run(run: Path, target: Path) -> Path:
    """A copy of a run's configuration and last checkpoint."""
    (target / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        shutil.copy2(run / name, target / name)
    return target
