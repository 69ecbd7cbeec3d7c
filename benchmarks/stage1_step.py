"""Measure a step of MoVE-KD's first stage without the language model, against the released formulation.

    python -m benchmarks.stage1_step --rounds 5
    python -m benchmarks.stage1_step --baseline ../MoVE-KD        # MoLE of a checkout of the released code
    python -m benchmarks.stage1_step --device cuda --batch 16 --precision bfloat16 --compile --peak 990

A step is forward, backward and AdamW's step: CLIP-L/336 with MoLE, tokens of EVA-02-L (4,096 of width 1,024) and
ConvNeXt-XXL (1,024 of width 3,072) from a store, distillation and balance. Weights, images and teachers' tokens are
random. Both formulations read EVA's and ConvNeXt's tokens from the same store, so that the teachers' own time, which is
most of a live step, is left out; ``ours`` reads the CLIP teacher from it as well, ``ours, CLIP live`` runs it. The
released formulation equips all 24 blocks, ours the 23 that the loss reaches. Variants take turns in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks.released import MakeMoLE, ReleasedMoLE, ReleasedStep, mole_of
from visexpert.experts import FeatureCache, VisionExpert
from visexpert.language import NoLanguage
from visexpert.methods import MoVEKD
from visexpert.methods.settings import AuxiliarySettings, HeadSettings, MoVEKDOptimizer, WeightingSettings
from visexpert.report.machine import describe_machine
from visexpert.types import Batch
from visexpert.vision import ClipEncoder, MoLESettings

CLIP_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
TEACHERS: dict[str, tuple[tuple[int, int], int]] = {"eva": ((64, 64), 1024), "convnext": ((32, 32), 3072)}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
RELEASED, OURS, LIVE = "released", "ours", "ours, CLIP live"


class RandomTeacher(VisionExpert):
    """A teacher whose tokens are the same noise for any image."""

    def __init__(self, grid_hw: tuple[int, int], width: int) -> None:
        super().__init__(image_size=grid_hw[0], token_dim=width, grid_hw=grid_hw, license="Apache-2.0")

    def load_weights(self) -> None:
        """Nothing."""

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Return noise (B, S, E)."""
        noise = torch.randn(1, math.prod(self.grid_hw), self.token_dim, generator=torch.Generator().manual_seed(0))
        return noise.to(pixels_BCHW).expand(len(pixels_BCHW), -1, -1)


class NoiseImages:
    """Images of noise, each from its own seed."""

    fingerprint = "noise"

    def __init__(self, rows: int, side: int) -> None:
        self.rows, self.side = rows, side

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return images (len(rows), 3, side, side), uint8."""
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        drawn = [torch.randint(0, 256, (3, self.side, self.side), dtype=torch.uint8, generator=g) for g in generators]
        return torch.stack(drawn)


def make_ours(
    clip: Mapping[str, Any], teachers: Mapping[str, tuple[tuple[int, int], int]], *, dropout: float = 0.05
) -> MoVEKD:
    """Return MoVE-KD with random weights and the released formulas; the weights of teachers are detached."""
    return MoVEKD(
        clip=ClipEncoder(config=dict(clip), layer=-2, mole=MoLESettings(init="released", dropout=dropout)),
        experts={name: RandomTeacher(grid, width) for name, (grid, width) in teachers.items()},
        language=NoLanguage(),
        lm_weight=0,
        heads=HeadSettings(alignment="to_student", adapter="released"),
        weighting=WeightingSettings(
            clip_teacher_weight=0.8, teachers="attention", tokens="attention", convention="released"
        ),
        kd_weight=0.5,
        auxiliary=AuxiliarySettings(balance_weight=0.01),
        optimizer=MoVEKDOptimizer(clip_lr=0.0),
    )


def make_released(
    ours: MoVEKD,
    clip: Mapping[str, Any],
    teachers: Mapping[str, tuple[tuple[int, int], int]],
    make: MakeMoLE = ReleasedMoLE,
) -> ReleasedStep:
    """Return the released formulation with the same CLIP and adapters."""
    sizes = {name: (math.prod(grid), width) for name, (grid, width) in teachers.items()}
    released = ReleasedStep(CLIPVisionConfig(**clip), sizes, make)
    assert ours.anchor is not None
    plain = ours.anchor.model.state_dict()
    released.anchor.load_state_dict(plain)
    for own in ("mole.original_module", "mole"):
        renamed = {key.replace(".mlp.", f".mlp.{own}."): value for key, value in plain.items()}
        released.student.load_state_dict(renamed, strict=False)
    for name in teachers:
        adapter: Any = ours.distillation.kd_heads()[name]
        released.first[name].load_state_dict(adapter.adapter.channels.state_dict())
        released.second[name].load_state_dict(adapter.adapter.tokens.state_dict())
    return released


@dataclass(frozen=True)
class Variant:
    """One formulation: its loss on a batch, and what trains."""

    loss: Callable[[Batch], Tensor]
    trained: list[nn.Parameter]
    store: FeatureCache | None


def variants_of(ours: MoVEKD, released: ReleasedStep, store: FeatureCache) -> dict[str, Variant]:
    """Return the formulations; both read the experts' tokens by ``ours.hub``."""
    own = [parameter for parameter in ours.parameters() if parameter.requires_grad]

    def as_released(batch: Batch) -> Tensor:
        tokens = {name: given.tokens_BSE for name, given in ours.hub(batch).items()}
        loss: Tensor = released((batch.images_01() - ours.clip.mean) / ours.clip.std, tokens)
        return loss

    def as_ours(batch: Batch) -> Tensor:
        return ours.step(batch).loss

    return {
        RELEASED: Variant(as_released, released.trained(), store),
        OURS: Variant(as_ours, own, store),
        LIVE: Variant(as_ours, own, None),
    }


def measure(
    ours: MoVEKD, variants: Mapping[str, Variant], batches: Sequence[Batch], *, rounds: int, options: Any
) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant in each round, after one untimed round."""
    optimizers = {name: torch.optim.AdamW(each.trained, lr=1e-5, fused=True) for name, each in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in variants if turn % 2 else reversed(list(variants)):
            ours._cache = variants[name].store
            batch = batches[turn % len(batches)].to(options.device)
            start = _now(options)
            with _precision(options):
                loss = variants[name].loss(batch)
            loss.backward()
            optimizers[name].step()
            taken = _now(options) - start
            optimizers[name].zero_grad(set_to_none=True)
            if turn:
                seconds[name].append(taken)
    return seconds


def _now(options: Any) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[options.clock]()


def _precision(options: Any) -> Any:
    if options.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(options.device, torch.bfloat16)


def print_table(seconds: Mapping[str, list[float]], flop: float, options: Any) -> None:
    """Print medians, ratios by round, images a second, and the share of the device's peak."""
    print(f"{describe_machine()}; {datetime.date.today()}, {options.rounds} rounds, {options.clock} time,")
    print(f"{options.batch} images a step, {options.precision}{', compiled' if options.compile else ''}.\n")
    print("| formulation | s a step | released / this (quartiles) | images/s | TFLOP/s (MFU) |")
    print("|---|---:|---:|---:|---:|")
    for name, own in seconds.items():
        found = [theirs / mine for theirs, mine in zip(seconds[RELEASED], own, strict=True)]
        low, middle, high = statistics.quantiles(found, n=4)
        median = statistics.median(own)
        rate = flop / median / 1e12
        share = f" ({rate / options.peak:.0%})" if options.peak else ""
        speed = f"{rate:.3f}{share}" if name == OURS else ""
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {median:.2f} | {ratio} | {options.batch / median:.3f} | {speed} |")


def main() -> None:
    """Measure and print the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # a bare loop has no trainer to log to, and Lightning says so
    ours = make_ours(CLIP_L, TEACHERS)
    ours.setup("fit")
    make = ReleasedMoLE if options.baseline is None else mole_of(options.baseline)
    released = make_released(ours, CLIP_L, TEACHERS, make)
    images = NoiseImages(2 * options.batch, CLIP_L["image_size"])
    ours.to(options.device).train()
    released.to(options.device).train()
    if options.compile:
        ours.clip.compile()
    with TemporaryDirectory(prefix="visexpert-") as folder:
        store = FeatureCache(folder, batch_size=1)
        ours.read_features(store, {"train": images})
        rows = torch.arange(len(images)).split(options.batch)
        batches = [Batch(images.read(own.tolist()), own, "train") for own in rows]
        with FlopCounterMode(display=False) as counter, _precision(options):
            ours.step(batches[0].to(options.device)).loss.backward()
        seconds = measure(ours, variants_of(ours, released, store), batches, rounds=options.rounds, options=options)
    print_table(seconds, counter.get_total_flops(), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="checkout of the released code, whose MoLE is run")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, at least 2 (default: 5)")
    parser.add_argument("--batch", type=int, default=1, help="images a step (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default), or cpu for a busy machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="autocast's dtype")
    parser.add_argument("--compile", action="store_true", help="compile the student of ours")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device at this precision, for MFU")
    return parser


if __name__ == "__main__":
    main()
