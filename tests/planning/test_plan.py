"""Plans of the smoke configurations against hand counts and against a step that is really run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visexpert.errors import ConfigError
from visexpert.methods import Method, ToVE
from visexpert.planning import Asked, Plan, Planned, configured_gpus, make_plan, read_configs
from visexpert.planning.make import ready_to_train, sample_of
from visexpert.planning.plan import Row
from visexpert.planning.show import other_gpus, steps_in_epochs
from visexpert.runs import build

TOVE, MOVEKD = "configs/tove/smoke.yaml", "configs/movekd/smoke.yaml"
TEXT = 60
T, D, H = 16, 32, 64
"""Patches, width and hidden width of the CLIP of both configurations."""


@cache
def read(config: str, *overrides: str) -> Planned:
    return read_configs([config], overrides)


@cache
def planned(config: str, *overrides: str) -> Plan:
    return make_plan(read(config, *overrides), Asked(gpus=2, gpu="a100", text_tokens=TEXT, answer_tokens=20))


def row(plan: Plan, name: str) -> Row:
    return next(row for row in plan.rows if row.name == name)


def block(tokens: int) -> int:
    """FLOP of a block of that CLIP: four projections, attention, MLP."""
    return 4 * 2 * tokens * D * D + 2 * 2 * tokens * tokens * D + 2 * 2 * tokens * D * H


PATCHES = 2 * T * (3 * 8 * 8) * D


def test_clip_is_counted_up_to_the_layer_that_is_read() -> None:
    assert row(planned(TOVE), "encoder").forward * 1e9 == pytest.approx(PATCHES + block(T + 1))
    assert row(planned(TOVE), "encoder").backward == 0
    of_cls = 2 * (T + 1) * D  # the [CLS] token's scores, computed beside the fused attention
    assert row(planned(MOVEKD), "frozen encoder").forward * 1e9 == pytest.approx(PATCHES + 2 * block(T + 1) + of_cls)
    student = row(planned(MOVEKD), "encoder")
    assert student.forward * 1e9 == pytest.approx(PATCHES + 2 * block(T + 1))
    linear, attention = 4 * 2 * 17 * D * D + 2 * 2 * 17 * D * H, 2 * 2 * 17 * 17 * D
    # Pixels need no gradient, so patches have that of their weights alone; attention has two gradients per product.
    assert student.backward * 1e9 == pytest.approx(PATCHES + 2 * 2 * (linear + attention))


def test_mole_is_counted_beside_the_clip_that_it_lies_in() -> None:
    mole = row(planned(MOVEKD), "MoLE")
    tokens, ranks, experts = T + 1, 12, 3
    products = D * experts + D * ranks + (ranks + experts) * H + H * ranks + (ranks + experts) * D
    assert mole.forward * 1e9 == pytest.approx(2 * 2 * tokens * products)
    assert mole.backward == pytest.approx(2 * mole.forward)
    per_layer = D * experts + experts + (D + H) * ranks * 2 + 2 * ranks + experts * (H + D)
    assert (mole.trained, mole.frozen) == (2 * per_layer, 0)


def test_projector_adapters_and_gate_are_counted_by_hand() -> None:
    plan = planned(TOVE)
    assert row(plan, "projector").forward * 1e9 == pytest.approx(2 * T * D * D)
    assert row(plan, "projector").trained == D * D + D + 2 * D
    assert row(plan, "gate").forward * 1e9 == pytest.approx(2 * T * D * 2)
    assert row(plan, "expert adapters").forward > 0
    assert not [row for row in plan.rows if not row.role]  # everything is in some part


@pytest.mark.parametrize("config", [TOVE, MOVEKD])
def test_a_real_step_costs_what_was_planned(config: str) -> None:
    plan, planned_ = planned(config), read(config)
    method, _ = build(planned_.config, "config")  # type: ignore[arg-type]
    assert isinstance(method, Method)
    ready_to_train(method)
    batch = sample_of(method, text_tokens=TEXT, answer_tokens=20, image_size=32)
    batch = batch.__class__(torch.rand(1, 3, 32, 32), batch.index_B, "", text=batch.text)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = method.step(batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert sum(row.forward for row in plan.rows) * 1e9 == pytest.approx(forward)
    assert plan.gflop_live * 1e9 == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("config", [TOVE, MOVEKD])
def test_every_parameter_is_counted_once(config: str) -> None:
    plan, method = planned(config), read(config).method
    assert sum(row.trained + row.frozen for row in plan.rows) == sum(p.numel() for p in method.parameters())
    assert sum(plan.shares.values()) + sum(r.training for r in plan.rows if not r.role) / plan.gflop == pytest.approx(1)
    frozen = {row.name for row in plan.rows if row.frozen and not row.trained}
    assert {name for name in frozen if name.startswith("expert ") and name != "expert adapters"} == {
        row.name for row in plan.rows if row.role == "teachers" and row.name != "frozen encoder"
    }


def test_hours_and_samples_follow_from_steps_or_epochs() -> None:
    plan = planned(TOVE)
    assert (plan.amount.steps, plan.amount.samples) == (8, 8 * 8 * 2)
    assert plan.hours == pytest.approx(plan.gflop * 1e9 * 128 / (2 * 19.5e12 * 0.4) / 3600)
    epochs = planned(TOVE, "--trainer.max_steps", "-1", "--trainer.max_epochs", "3")
    assert (epochs.amount.samples, epochs.amount.steps) == (3 * 32, 3 * 2)
    assert plan.hours is not None
    half = planned(TOVE, "--trainer.precision", "bf16-mixed")
    assert half.hours == pytest.approx(plan.hours * 19.5 / 312)
    assert half.activation_bytes < plan.activation_bytes


def test_a_store_moves_the_teachers_out_of_the_steps_onto_the_disk() -> None:
    live, stored = planned(TOVE), planned(TOVE, "--model.init_args.store.folder", "auto")
    assert {row.name for row in stored.rows if row.is_stored} == {"encoder", "expert semantic", "expert depth"}
    assert stored.gflop == pytest.approx(live.gflop * (1 - live.shares["teachers"] - live.shares["student"]))
    method = read(TOVE).method
    assert isinstance(method, ToVE)
    depth = method.hub["depth"]
    per_image = 2 * (T * D + T * 24 + depth.grid_hw[0] * depth.grid_hw[1])  # float16; features on CLIP's grid
    assert stored.disk.store == 32 * per_image
    assert live.disk.store == 0
    kept = planned(MOVEKD, "--model.init_args.store.folder", "auto")
    assert row(kept, "frozen encoder").is_stored and not row(kept, "encoder").is_stored
    alone = planned(MOVEKD, "--model.init_args.store.folder", "auto", "--model.init_args.use", "[]")
    assert alone.disk.store == 32 * 2 * (T + 1) * (D + 2)  # hidden states and [CLS] attention of two heads, float16


def test_memory_counts_weights_as_the_language_model_packs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_now = read(MOVEKD)
    language = planned_now.method.language
    plain, weights = planned(MOVEKD).memory, list(language.parameters())
    monkeypatch.setattr(language, "packed_weights", lambda: {id(weight): 0.5 for weight in weights})
    packed = make_plan(planned_now, Asked(gpus=2, gpu="a100", text_tokens=TEXT, answer_tokens=20)).memory
    assert plain.weights - packed.weights == 3.5 * sum(weight.numel() for weight in weights) > 0


def test_a_checkpoint_holds_what_trains_twice_over_and_no_teacher() -> None:
    method = read(TOVE).method
    kept = sum(v.numel() * v.element_size() for k, v in method.state_dict().items() if k[:4] not in ("clip", "hub."))
    trained = sum(row.trained for row in planned(TOVE).rows)
    assert planned(TOVE).disk.checkpoint == kept + 2 * 4 * trained
    assert kept >= 4 * trained


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Asked(gpus=0), "gpus .*got 0"),
        (lambda: Asked(mfu=1.5), "mfu .*got 1.5"),
        (lambda: make_plan(read(TOVE), Asked(gpu="abacus")), "abacus"),
        (lambda: make_plan(read(TOVE), Asked(text_tokens=1)), "text_tokens .*got 1 and 0"),
        (lambda: read("configs/zoo/clip.yaml"), "needs a method"),
    ],
)
def test_impossible_wishes_are_refused_in_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("gpus", "epochs", "epoch"), [(2, "0.80", 5), (1, "0.40", 10), (4, "1.60", 3)])
def test_steps_are_told_in_epochs(gpus: int, epochs: str, epoch: int) -> None:
    """4 steps of 4 images per GPU, of 40: with half the GPUs, the same steps are half the epochs."""
    options = ("--trainer.max_steps=4", "--data.init_args.batch_size=4")
    plan = make_plan(read(TOVE, *options), Asked(gpus=gpus, samples=40, text_tokens=TEXT))
    assert (plan.amount.per_step, plan.amount.epoch_steps) == (4 * gpus, epoch)
    told = steps_in_epochs(plan)
    assert f"max_steps: 4 of {4 * gpus} samples ({gpus} GPUs) are {16 * gpus} samples, {epochs} epochs of 40" in told
    assert told.endswith(f"one epoch is max_steps: {epoch}.")


@pytest.mark.parametrize(
    ("gpus", "trainer", "samples", "told"),
    [
        (2, ["max_steps=5"], 40, None),
        (2, ["max_steps=5"], 44, None),  # the rest of an epoch may be dropped
        (1, ["max_steps=5"], 40, ("max_steps: 5 reads 0.50 epochs of 40", "one epoch would be max_steps: 10")),
        (4, ["max_steps=5"], 40, None),  # 2 epochs
        (2, ["max_steps=7"], 40, ("1.40 epochs", "one epoch would be max_steps: 5")),
        (2, ["max_steps=9"], 40, ("1.80 epochs", "2 epochs would be max_steps: 10")),
        (2, ["max_steps=5", "max_epochs=2"], 40, ("1.00 epochs", "max_epochs is 2", "max_steps: 10")),
        (2, ["max_steps=10", "max_epochs=2"], 40, None),
        (2, ["max_steps=-1", "max_epochs=2"], 40, None),
        (1, ["max_steps=5"], None, None),  # nobody asked for epochs
    ],
)
def test_steps_that_are_not_what_is_asked_are_warned_of(
    gpus: int, trainer: list[str], samples: int | None, told: tuple[str, ...] | None
) -> None:
    options = [f"--trainer.{option}" for option in trainer]
    plan = make_plan(
        read(TOVE, *options, "--data.init_args.batch_size=4"), Asked(gpus=gpus, samples=samples, text_tokens=TEXT)
    )
    assert plan.as_json()["warning"] == plan.warning
    assert (plan.warning is None) == (told is None)
    assert all(words in str(plan.warning) for words in told or ())


@pytest.mark.parametrize(
    ("trainer", "gpus"),
    [
        ({"devices": 8, "num_nodes": 2}, 16),
        ({"devices": [0, 3], "num_nodes": 2}, 4),
        ({"devices": "0,3"}, 2),
        ({"devices": "4", "num_nodes": None}, 4),
        ({"devices": "auto", "num_nodes": 2}, None),
        ({"devices": -1}, None),
        ({}, None),
    ],
)
def test_the_configurations_own_gpus_are_devices_times_nodes(trainer: dict[str, object], gpus: int | None) -> None:
    assert configured_gpus(trainer) == gpus


def test_another_number_of_gpus_than_the_configurations_is_told_with_what_it_changes() -> None:
    """Of 40 images, 4 a GPU: 4 steps on the configuration's 4 GPUs are 64 images, on one GPU 16."""
    own = ("--trainer.devices=2", "--trainer.num_nodes=2", "--data.init_args.batch_size=4")
    steps = read(TOVE, *own, "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=3")
    plan = make_plan(steps, Asked(gpus=1, samples=40, text_tokens=TEXT))
    assert plan.configured is not None and plan.configured.gpus == 4 and plan.as_json()["configured"]["gpus"] == 4
    told = other_gpus(plan, plan.configured)
    assert "asks for 4 GPUs and 48 samples a step, not 1 and 12" in told
    assert "its 4 steps would read 192 samples, not 48 (4.80 epochs, not 1.20)" in told
    assert told.endswith("trainer.accumulate_grad_batches: 12 keeps its batch.")
    epochs = read(TOVE, *own, "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    plan = make_plan(epochs, Asked(gpus=8, samples=40, text_tokens=TEXT))
    assert plan.configured is not None
    told = other_gpus(plan, plan.configured)
    assert "the same epochs are 6 steps there, not 4" in told and "accumulate" not in told
    assert make_plan(epochs, Asked(gpus=4, samples=40, text_tokens=TEXT)).configured is None


def test_the_wrong_one_of_several_settings_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        Asked(gpus=0)
    message = str(error.value)
    assert "gpus must be at least 1, got 0" in message and "mfu" not in message and "None" not in message
