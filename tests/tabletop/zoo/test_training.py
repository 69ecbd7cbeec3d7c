"""Every zoo config trains: a few steps lower the loss, the same seed gives the same weights, and files come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from visexpert.errors import ConfigError
from visexpert.tabletop import TabletopData
from visexpert.tabletop.tiny import TinyExpert
from visexpert.tabletop.zoo.base import ZooModule
from visexpert.tabletop.zoo.contrastive import ContrastiveCLIP, text_of
from visexpert.tabletop.zoo.dense import DenseExpert
from visexpert.tabletop.zoo.heads import DepthTask, EdgeTask
from visexpert.tabletop.zoo.selfsup import MaskedExpert
from visexpert.tabletop.zoo.ship import ShipWeights

CONFIGS = Path(__file__).parents[3] / "configs" / "zoo"
STEPS = 10


class LossRecorder(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def model_arguments(name: str) -> dict[str, Any]:
    """``model.init_args`` of a zoo config."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments: dict[str, Any] = config["model"]["init_args"]
    return arguments


def shipped_name(config: dict[str, Any]) -> str | None:
    """Name under which a config's ShipWeights writes, None for configs that ship otherwise."""
    for callback in config.get("trainer", {}).get("callbacks", []):
        if callback["class_path"] == "visexpert.tabletop.zoo.ship.ShipWeights":
            return str(callback["init_args"]["name"])
    return None


def train(module: ZooModule, data: TabletopData, folder: Path, *, steps: int = STEPS) -> tuple[list[float], L.Trainer]:
    """Train for a few steps with the callback that ships."""
    recorder = LossRecorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[recorder, ShipWeights(name="trial", out_dir=str(folder), cards_dir=str(folder))],
    )
    trainer.fit(module, datamodule=data)
    return recorder.losses, trainer


def edges(seed: int) -> DenseExpert:
    torch.manual_seed(seed)
    return DenseExpert(arch=model_arguments("edges")["arch"], task=EdgeTask(), lr=3e-3)


def test_dense__loss_falls_and_the_file_reproduces_the_score(zoo_data: TabletopData, tmp_path: Path) -> None:
    module = edges(0)
    losses, trainer = train(module, zoo_data, tmp_path)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    facts = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert facts["steps"] == STEPS and facts["score"] == pytest.approx(
        float(trainer.callback_metrics["val/edge_f1"]), abs=1e-3
    )
    shipped = TinyExpert(source=str(tmp_path / "trial.safetensors")).eval()
    shipped.load_weights()
    images = torch.rand(2, 3, 96, 96)
    module.eval()
    torch.testing.assert_close(shipped.predict(images), module.expert.predict(images), rtol=0.02, atol=0.02)
    assert "# zoo:trial" in (tmp_path / "trial.md").read_text(encoding="utf-8")


def test_dense__same_seed_same_weights(zoo_data: TabletopData, tmp_path: Path) -> None:
    states = []
    for run in ("a", "b"):
        train(edges(3), zoo_data, tmp_path / run, steps=2)
        states.append(load_file(tmp_path / run / "trial.safetensors"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_contrastive__loss_falls(zoo_data: TabletopData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses, _ = train(ContrastiveCLIP(**{**model_arguments("clip"), "lr": 3e-3}), zoo_data, tmp_path)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert (tmp_path / "trial" / "model.safetensors").is_file() and (tmp_path / "trial_text.safetensors").is_file()


def test_masked__loss_falls(zoo_data: TabletopData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses, _ = train(MaskedExpert(**{**model_arguments("selfsup"), "lr": 3e-3}), zoo_data, tmp_path)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert not any("mask_token" in key for key in load_file(tmp_path / "trial.safetensors"))


def test_errors__say_what_the_data_lacks(zoo_data: TabletopData) -> None:
    zoo_data.setup("validate")
    batch = next(iter(zoo_data.image_dataloader("val")))
    module = DenseExpert(arch=model_arguments("depth")["arch"], task=DepthTask())
    bare = type(batch)(batch.images_BCHW, batch.index_B, batch.split)
    with pytest.raises(ConfigError, match="set with_targets: true"):
        module.training_step(bare, 0)
    with pytest.raises(ConfigError, match="exactly one caption"):
        text_of(batch)
    with pytest.raises(ConfigError, match="mask_ratio=1.5"):
        MaskedExpert(**{**model_arguments("selfsup"), "mask_ratio": 1.5})
    with pytest.raises(ConfigError, match="of kind vit"):
        MaskedExpert(arch=model_arguments("edges")["arch"])
    with pytest.raises(ConfigError, match="must be one word"):
        ShipWeights(name="../escape")


def test_every_config__builds_and_ships_under_its_own_name() -> None:
    configs = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.glob("*.yaml")}
    shipping = {name: config for name, config in configs.items() if shipped_name(config) is not None}
    assert len(shipping) >= 8
    for name, config in shipping.items():
        assert shipped_name(config) == name
        assert config["trainer"]["max_steps"] % config["trainer"]["val_check_interval"] == 0
        assert config["data"]["init_args"]["train_split"] == "zoo"
