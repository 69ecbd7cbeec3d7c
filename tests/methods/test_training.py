"""Training under Lightning: resuming to the bit, the frozen start of the language model, cached features."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.methods.helpers import bare_trainer, shake, tiny_tove
from visexpert.errors import ConfigError
from visexpert.methods import ToVE
from visexpert.methods.step import refuse_engines
from visexpert.tabletop import TabletopData
from visexpert.tabletop.datamodule import TextSettings
from visexpert.transfer import GateSettings

MakeData = Callable[..., TabletopData]


class Recorder(L.Callback):
    """Keeps each step's loss and the trained weights after it."""

    def __init__(self, *, die_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self._die_after = die_after

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.weights.append(weights(pl_module))
        if trainer.global_step == self._die_after:
            raise KilledError


class KilledError(Exception):
    """The run dies here."""


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if not key.startswith(("clip.", "hub."))}


def noisy_tove(**options: Any) -> ToVE:
    return tiny_tove(noise="learned", dropout=0.1, **options)


@pytest.mark.parametrize("die_after", [3, 5])
def test_an_interrupted_run_ends_with_the_weights_of_one_never_interrupted(
    tmp_path: Path, data: MakeData, die_after: int
) -> None:
    """Checkpoints lie at steps 2 and 4 of 6, the second at the end of the first epoch (16 scenes, 4 a batch).

    Noise on the gate, dropout, the choice of texts and the order of scenes must all go on as they would have.
    """
    whole = Recorder()
    bare_trainer(tmp_path, steps=6, callbacks=[whole]).fit(noisy_tove(), datamodule=data())

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=2)

    first = Recorder(die_after=die_after)
    with pytest.raises(KilledError):
        bare_trainer(tmp_path, steps=6, callbacks=[saving(), first]).fit(noisy_tove(), datamodule=data())
    second = Recorder()
    model = shake(noisy_tove())  # other weights, all of which the checkpoint must replace
    bare_trainer(tmp_path, steps=6, callbacks=[saving(), second]).fit(
        model, datamodule=data(), ckpt_path="last", weights_only=True
    )
    resumed_at = die_after - 1
    assert whole.losses[:die_after] == first.losses
    assert whole.losses[resumed_at:] == second.losses
    assert whole.weights[-1].keys() == second.weights[-1].keys()
    for key, value in whole.weights[-1].items():
        assert torch.equal(value, second.weights[-1][key]), key
    assert any(not torch.equal(value, whole.weights[0][key]) for key, value in whole.weights[-1].items())


def test_frozen_parts_are_no_reason_to_warn_in_a_trainer_of_ones_own(tmp_path: Path, data: MakeData) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        bare_trainer(tmp_path, steps=1).fit(tiny_tove(), datamodule=data())
    assert [str(one.message) for one in shown if "eval mode" in str(one.message)] == []


def test_the_seed_of_the_run_decides_the_noise(tmp_path: Path, data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[list[float]] = []
    for seed in ("3", "3", "4"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        recorder = Recorder()
        torch.manual_seed(len(losses))  # what was drawn before the run does not matter
        bare_trainer(tmp_path, steps=1, callbacks=[recorder]).fit(shake(noisy_tove()), datamodule=data())
        losses.append(recorder.losses)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("frozen_steps", "language_lr"), [(2, 2e-3), (0, 0.0)])
def test_the_language_model_joins_in_when_it_is_told_to(
    tmp_path: Path, data: MakeData, frozen_steps: int, language_lr: float
) -> None:
    model = shake(tiny_tove(language_frozen_steps=frozen_steps, language_lr=language_lr, warmup_steps=1))
    start = weights(model)
    recorder = Recorder()
    bare_trainer(tmp_path, steps=4, callbacks=[recorder]).fit(model, datamodule=data())

    def moved(step: int, prefix: str) -> bool:
        before = start if step == 0 else recorder.weights[step - 1]
        after = recorder.weights[step]
        return any(not torch.equal(value, before[key]) for key, value in after.items() if key.startswith(prefix))

    joins = [language_lr > 0 and step >= frozen_steps for step in range(4)]
    assert [moved(step, "language.") for step in range(3)] == joins[:3]
    assert all(moved(step, "adapters.") for step in range(3))


@pytest.mark.parametrize("engine", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_engines_that_keep_gradients_to_themselves_cannot_hold_the_language_model_back(engine: str) -> None:
    strategy = object.__new__(getattr(strategies, engine))  # DeepSpeed itself is not installed
    with pytest.raises(ConfigError, match=rf"language_frozen_steps=100 .*{engine}.* set it to 0.* strategy ddp"):
        refuse_engines(strategy, on_nan="stop", frozen_steps=100)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_cached_features_give_the_loss_of_live_ones(
    tmp_path: Path, data: MakeData, dtype: str, tolerance: float
) -> None:
    live, cached = Recorder(), Recorder()
    bare_trainer(tmp_path, steps=3, callbacks=[live]).fit(shake(tiny_tove()), datamodule=data())
    model = shake(tiny_tove(folder=str(tmp_path / "store"), dtype=dtype))
    calls = {"clip": 0, "semantic": 0, "depth": 0, "edges": 0}

    def counted(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[name] += 1

        return count

    model.clip.register_forward_hook(counted("clip"))
    for name in model.hub.names:
        model.hub[name].register_forward_hook(counted(name))
    bare_trainer(tmp_path, steps=3, callbacks=[cached]).fit(model, datamodule=data())
    assert cached.losses == pytest.approx(live.losses, abs=tolerance)
    # Train and validation images: each one batch of all; no step runs an encoder.
    assert set(calls.values()) == {2}
    assert len(list((tmp_path / "store").glob("*/shard-*"))) == 8


def test_training_images_of_another_name_are_cached_too(tmp_path: Path, data: MakeData) -> None:
    model = tiny_tove(use=["edges"], folder=str(tmp_path))
    ran: list[int] = []
    model.clip.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    source = data(train_split="ground", num_train=5, num_val=2, batch_size=5)
    bare_trainer(tmp_path, steps=2).fit(model, datamodule=source)
    assert ran == [5, 2]


def test_data_without_images_by_row_cannot_be_cached(tmp_path: Path, data: MakeData) -> None:
    model = tiny_tove(folder=str(tmp_path))
    source = data()
    source.prepare_data()
    source.setup("fit")

    class Plain(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return source.train_dataloader()

    with pytest.raises(ConfigError, match="Plain does not provide .*image_sources.*; set it to null"):
        bare_trainer(tmp_path, steps=1).fit(model, datamodule=Plain())


def test_a_run_is_scored_with_captions_probes_and_flat_names(tmp_path: Path, data: MakeData) -> None:
    model = shake(tiny_tove(caption_images=3))
    mixture = {"dense": 1, "relation": 1, "vsr": 1, "vqa": 1, "pope": 1}
    (scores,) = bare_trainer(tmp_path, steps=1).test(
        model, datamodule=data(num_test=20, texts=TextSettings(eval=mixture), with_targets=True), verbose=False
    )
    groups = {name.split("/")[1] for name in scores}
    assert {"nll", "vqa", "vsr", "pope", "slots", "caption", "probe"} <= groups
    assert all(name.startswith("test/") for name in scores)
    assert torch.tensor(list(scores.values())).isfinite().all()
    # Random weights spread their bets over the vocabulary: the mean cost is that of a guess, in nats.
    assert scores["test/nll/nll"] > 3.0


def test_a_frozen_part_that_the_start_has_changed_stays_in_checkpoints(tmp_path: Path, data: MakeData) -> None:
    """A merged run's CLIP is no longer that of its own file; frozen or not, the run needs it when the start is gone."""
    donor = tiny_tove(seed=7, use=[], clip_lr=1e-3)
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(donor, datamodule=data())
    trainer.save_checkpoint(tmp_path / "donor.ckpt")
    state: dict[str, Any] = {}
    model = tiny_tove(init_from=str(tmp_path / "donor.ckpt"))
    for name in ("first", "second"):
        trainer = bare_trainer(tmp_path, steps=1 if name == "first" else 2)
        checkpoint = None if name == "first" else tmp_path / "first.ckpt"
        trainer.fit(model, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        clip = {key: value for key, value in donor.state_dict().items() if key.startswith("clip.")}
        assert clip and all(torch.equal(state[key], value) for key, value in clip.items())
        model = tiny_tove(init_from=str(tmp_path / "donor.ckpt"))
        model.continue_run()
    assert not any(key.startswith("hub.") for key in state)


def test_a_start_from_an_earlier_run(tmp_path: Path, data: MakeData, caplog: pytest.LogCaptureFixture) -> None:
    donor = shake(tiny_tove(use=["semantic"]))
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(donor, datamodule=data())
    trainer.save_checkpoint(tmp_path / "donor.ckpt")
    model = tiny_tove(
        seed=5, init_from=str(tmp_path / "donor.ckpt"), use=["semantic", "edges"], gate=GateSettings(kind="uniform")
    )
    fresh = model.adapters["edges"].get_parameter("hidden.weight").clone()
    with caplog.at_level(logging.INFO):
        model.setup("fit")
    assert torch.equal(model.projector.get_parameter("layers.weight"), donor.projector.get_parameter("layers.weight"))
    copies = [part.adapters["semantic"].get_parameter("out.weight") for part in (model, donor)]
    assert torch.equal(*copies)
    assert torch.equal(model.adapters["edges"].get_parameter("hidden.weight"), fresh)
    assert "adapters.edges" in caplog.text and "Started from" in caplog.text


def test_adamw_gets_the_betas_that_were_asked_for(tmp_path: Path, data: MakeData) -> None:
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(tiny_tove(betas=(0.8, 0.9)), datamodule=data())
    assert trainer.optimizers[0].defaults["betas"] == (0.8, 0.9)


def test_parts_of_the_loss_are_logged_when_a_row_is_written_and_at_the_end(
    tmp_path: Path, data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[int, set[str]] = {}
    inner = ToVE.log_dict

    def spy(self: ToVE, values: Any, **options: Any) -> None:
        logged.setdefault(self.global_step + 1, set()).update(values)
        inner(self, values, **options)

    monkeypatch.setattr(ToVE, "log_dict", spy)
    model, trainer = tiny_tove(warmup_steps=1), bare_trainer(tmp_path, steps=5, log_every_n_steps=2)
    trainer.fit(model, datamodule=data())
    assert {step for step, names in logged.items() if "train/loss" in names} == {1, 2, 3, 4, 5}
    assert {step for step, names in logged.items() if "train/text_loss" in names} == {2, 4, 5}
    assert "train/text_loss" in trainer.callback_metrics
