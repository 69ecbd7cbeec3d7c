"""Batches under every precision plugin of Lightning, and whole runs in the precisions that configurations name."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import (
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.two_processes import in_two_processes
from visexpert.callbacks.figures import RunFigures
from visexpert.cli import main
from visexpert.export.flattening import Flattening
from visexpert.language.base import Projector
from visexpert.methods import Method
from visexpert.methods.evaluation import EvalOutput
from visexpert.optim import adamw
from visexpert.precision import ClippedModule, clip_gradients, convert_records
from visexpert.tabletop.zoo.base import ZooModule
from visexpert.transfer.gate import TokenGate
from visexpert.transfer.standardize import Standardize
from visexpert.types import Batch, StepCounts, TextBatch, TextItem, VisionTokens

CONFIGS = Path(__file__).parents[1] / "configs"

PLUGINS: list[tuple[Precision, torch.dtype]] = [
    (Precision(), torch.float32),
    (MixedPrecision("bf16-mixed", "cpu"), torch.float32),
    (HalfPrecision("bf16-true"), torch.bfloat16),
    (HalfPrecision("16-true"), torch.float16),
    (DoublePrecision(), torch.float64),
    (FSDPPrecision("bf16-true"), torch.bfloat16),
    (FSDPPrecision("bf16-mixed"), torch.float32),
    (DeepSpeedPrecision("bf16-mixed"), torch.bfloat16),
    (DeepSpeedPrecision("16-true"), torch.float16),
]


def trainer_with(plugin: Precision, **facts: Any) -> L.Trainer:
    return cast(L.Trainer, SimpleNamespace(precision_plugin=plugin, **facts))


def batch_of(images_BCHW: torch.Tensor) -> Batch:
    ids = torch.tensor([[1, 40_001, 2]])
    text = TextBatch(ids, ids.clone(), torch.ones_like(ids), torch.arange(3)[None])
    return Batch(
        images_BCHW,
        torch.tensor([70_001]),
        "train",
        text,
        items=((TextItem("vqa", "how many?", "two"),),),
        targets={"depth_BHW": torch.ones(1, 2, 2), "instance_BHW": torch.ones(1, 2, 2, dtype=torch.int16)},
        has_image_B=torch.tensor([True]),
        original_hw_B2=torch.tensor([[481, 640]]),
        step=StepCounts({"token": 3, "image": 1}, {"token": 3, "image": 1}, 0),
    )


@pytest.mark.parametrize(("plugin", "dtype"), PLUGINS, ids=lambda value: str(getattr(value, "precision", value)))
def test_every_plugin_casts_floats_of_a_batch_and_nothing_else(plugin: Precision, dtype: torch.dtype) -> None:
    trainer = trainer_with(plugin)
    convert_records(trainer)
    convert_records(trainer)  # data and method both ask
    given = batch_of(torch.rand(1, 3, 4, 4))
    found = plugin.convert_input(given)
    assert type(found) is Batch and found.images_BCHW.dtype == found.targets["depth_BHW"].dtype == dtype
    for name in ("index_B", "has_image_B", "original_hw_B2"):
        assert getattr(found, name).dtype == getattr(given, name).dtype
        assert torch.equal(getattr(found, name), getattr(given, name))
    assert found.text is not None and given.text is not None
    for name in ("ids_BN", "labels_BN", "segments_BN", "positions_BN"):
        assert torch.equal(getattr(found.text, name), getattr(given.text, name))
        assert getattr(found.text, name).dtype == torch.int64
    assert found.targets["instance_BHW"].dtype == torch.int16
    assert found.items == given.items and found.step == given.step
    assert plugin.convert_input({"x": torch.rand(2)})["x"].dtype == dtype  # other data as before


@pytest.mark.parametrize(("plugin", "dtype"), PLUGINS[:5], ids=lambda value: str(getattr(value, "precision", value)))
def test_pixels_stay_bytes_until_an_encoder_scales_them(plugin: Precision, dtype: torch.dtype) -> None:
    convert_records(trainer_with(plugin))
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    with plugin.forward_context():
        found = plugin.convert_input(batch_of(pixels))
        assert torch.equal(found.images_BCHW, pixels)
        assert torch.equal(found.images_01(), pixels.to(torch.float32) / 255)


def test_what_meets_weights_is_cast_to_theirs() -> None:
    projector = Projector(in_dim=4, out_dim=3, kind="linear", norm=True).bfloat16()
    assert projector(torch.rand(1, 2, 4)).dtype == torch.bfloat16
    gate = TokenGate(dim=4, num_experts=2).bfloat16()  # tokens that are read from the store are float32
    assert gate(torch.rand(1, 2, 4), [True, True]).gates_BTK.shape == (1, 2, 2)


def test_statistics_over_a_run_stay_float32_in_a_model_of_16_bits() -> None:
    """Means of 1000 batches of ones and threes: bfloat16 would stop counting after some hundred."""
    standardize = Standardize(1).bfloat16().train()
    for number in range(1000):
        standardize(torch.full((1, 4, 1), 1.0 if number < 500 else 3.0))
    mean = standardize.statistics.running_mean
    assert mean is not None and mean.dtype == torch.float32
    assert mean.item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_in_every_precision(precision: str, algorithm: str) -> None:
    class Scaler:
        """Stands for the scale of 16-mixed, which only a GPU has."""

    plugin = Precision()
    if precision != "32-true":
        scaler: Any = Scaler() if precision == "16-mixed" else None
        plugin = MixedPrecision(cast(Any, precision), "cpu", scaler)
    trainer = trainer_with(plugin, gradient_clip_val=1.0, gradient_clip_algorithm=GradClipAlgorithmType(algorithm))

    module = L.LightningModule()
    module._trainer = trainer
    weight = nn.Parameter(torch.zeros(2))
    optimizer = adamw([{"params": [weight]}], lr=0.1, betas=(0.9, 0.98), trainer=trainer)
    assert optimizer.defaults["fused"] == (precision != "16-mixed")
    weight.grad = torch.tensor([3.0, 4.0])
    clip_gradients(module, optimizer, 1.0, algorithm)
    expected = [0.6, 0.8] if algorithm == "norm" else [1.0, 1.0]
    torch.testing.assert_close(weight.grad, torch.tensor(expected), atol=1e-5, rtol=0)


def clipped_shards(rank: int, algorithm: str) -> list[list[float]]:
    """Gradients of a layer under FSDP after a module has clipped them; rank 1 has another image than rank 0."""
    layer = nn.Linear(2, 2, bias=False)
    root = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)
    given = torch.tensor([[3.0, 4.0]] if rank == 0 else [[1.0, 0.0]])
    root(given).sum().backward()
    module = ClippedModule()
    plugin = FSDPPrecision("bf16-mixed")
    module._trainer = trainer_with(
        plugin,
        strategy=SimpleNamespace(model=root),
        gradient_clip_val=1.0,
        gradient_clip_algorithm=GradClipAlgorithmType(algorithm),
    )
    optimizer = adamw([{"params": list(root.parameters())}], lr=0.1, betas=(0.9, 0.98), trainer=module.trainer)
    module.configure_gradient_clipping(optimizer, 1.0, algorithm)
    return [p.grad.tolist() for p in root.parameters() if p.grad is not None]


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", 0.5), ("value", 1.0)])
def test_shards_of_gradients_are_clipped_by_the_norm_of_the_whole(algorithm: str, expected: float) -> None:
    """The mean gradient is 2 in each of four places, so its norm is 4; that of a shard is less."""
    for shards in in_two_processes(clipped_shards, algorithm):
        for shard in shards:
            assert shard == pytest.approx([expected] * 2, abs=1e-4)


def trained_modules(kind: type[L.LightningModule]) -> Iterator[type[L.LightningModule]]:
    """Classes of this package that have an optimizer."""
    for child in kind.__subclasses__():
        if child.__module__.startswith("visexpert.") and "configure_optimizers" in vars(child):
            yield child
        yield from trained_modules(child)


def test_whatever_has_an_optimizer_clips_in_every_precision() -> None:
    found = set(trained_modules(L.LightningModule))
    assert {Method, Flattening, ZooModule} <= found
    assert [kind.__name__ for kind in found if not issubclass(kind, ClippedModule)] == []


def test_gates_in_bfloat16_are_kept_for_the_figures() -> None:
    figures = RunFigures(num_maps=1)
    gates = torch.tensor([[[0.25, 0.75]] * 4], dtype=torch.bfloat16)
    vision = VisionTokens(torch.zeros(1, 4, 2), (2, 2), gates_BTK=gates)
    batch = Batch(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.tensor([0]), "test")
    figures.on_test_batch_end(cast(Any, None), L.LightningModule(), {"output": EvalOutput(vision)}, batch, 0)
    assert figures._gates[0].tolist() == [[[[0.25, 0.75]] * 2] * 2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all runs, so that scenes are rendered once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        yield


@pytest.mark.parametrize("method", ["movekd", "tove"])
def test_a_whole_run_with_weights_in_16_bits(method: str, tmp_path: Path) -> None:
    """Fit with clipped gradients, test, figures, cost: all of it in 16 bits."""
    main(
        [
            "fit",
            "--config",
            str(CONFIGS / method / "smoke.yaml"),
            "--run",
            str(tmp_path),
            "--trainer.precision",
            "bf16-true",
            "--trainer.gradient_clip_val",
            "1.0",
            "--trainer.max_steps",
            "2",
            "--trainer.val_check_interval",
            "2",
            "--model.init_args.evaluation.caption_images",
            "2",
            "--trainer.enable_progress_bar",
            "false",
        ]
    )
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn >= ({"gate_maps", "gate_by_region"} if method == "tove" else {"cls_attention", "router_usage"})
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    held = {value.dtype for key, value in state.items() if value.is_floating_point() and "language" in key}
    assert held == {torch.bfloat16}
