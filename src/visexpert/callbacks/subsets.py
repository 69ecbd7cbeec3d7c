"""Scores and times of many subsets of experts in one pass over the validation images."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.methods import FusingMethod
from visexpert.methods.cost import first_images, inference_counter, live
from visexpert.methods.evaluation import Evaluator
from visexpert.methods.step import sums_over_processes
from visexpert.methods.tove.subset_search import Subset
from visexpert.processes import is_first
from visexpert.timing import Meanwhile, spread_of
from visexpert.types import Batch


class SubsetScoring(L.LightningModule):
    """Scores subsets of experts in one pass over validation batches; each encoder runs once a batch for all of them.

    Args:
        model: The trained model, with all experts attached that take part.
        images: Validation images to score on; None takes all. Several processes have an equal share of them each.
    """

    def __init__(self, model: FusingMethod, *, images: int | None) -> None:
        super().__init__()
        self.model, self.images = model, images
        self.everything = model.hub.attached
        self.subsets: tuple[Subset, ...] = ()
        self.metrics: dict[Subset, dict[str, float]] = {}
        self.gflop: dict[Subset, float] = {}
        self.gate_mass: dict[str, float] = {}
        self.seen = 0

    def on_validation_epoch_start(self) -> None:
        """Reset the scores, and read frozen tokens from the model's store where it has one."""
        self._evaluators = {subset: Evaluator(captions=0) for subset in self.subsets}
        self._gates: list[Tensor] = []
        self.seen = 0
        self.model.hub.attach_only(self.everything)
        data, cache = self.trainer.datamodule, self.model.feature_cache  # type: ignore[attr-defined]
        if cache is not None and hasattr(data, "image_sources"):
            self.model.read_features(cache, data.image_sources())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch with each subset."""
        if batch_idx == 0:
            self.gflop |= self._gflop(batch)
        if self.images is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            left = max(0, (self.images + world - 1 - rank) // world - self.seen)
            batch = replace(first_images(batch, left), items=batch.items[:left])
        if not len(batch):
            return
        self.seen += len(batch)
        self.model.hub.attach_only(self.everything)
        with run_once(self.model.subset_modules()):
            for subset in self.subsets:
                self.model.hub.attach_only(subset)
                self.model.evaluators["val"] = self._evaluators[subset]
                gates_BTK = self.model.evaluate(batch, "val").vision.gates_BTK
                if subset == self.everything and gates_BTK is not None:
                    self._gates.append(gates_BTK.mean(1))

    def on_validation_epoch_end(self) -> None:
        """Compute the scores and, where all experts were attached, each expert's mean gate."""
        self.metrics = {subset: evaluator.compute() for subset, evaluator in self._evaluators.items()}
        masses = torch.cat(self._gates) if self._gates else torch.zeros(0, len(self.model.hub.names))
        mass = sums_over_processes(dict(zip(self.model.hub.names, masses.sum(0).tolist(), strict=True)))
        counts = sums_over_processes({"gates": len(masses), "images": self.seen})
        self.seen = int(counts["images"])
        if counts["gates"]:
            self.gate_mass = {name: mass[name] / counts["gates"] for name in self.everything}

    def _gflop(self, batch: Batch) -> dict[Subset, float]:
        """Count the GFLOP of the vision side with each subset for one image, encoders live; each runs once for all."""
        if batch.text is None:
            raise ConfigError("ExpertDetachment: the validation data has no text, so experts contribute nothing there.")
        image, found = live(first_images(batch, 1)), dict[Subset, float]()
        self.model.hub.attach_only(self.everything)
        with (
            inference_counter() as counter,
            run_once(self.model.subset_modules(), work=counter.get_total_flops) as spared,
        ):
            for subset in self.subsets:
                spared.clear()
                before = counter.get_total_flops()
                self.model.hub.attach_only(subset)
                self.model.encode(image)
                found[subset] = (counter.get_total_flops() - before + sum(spared)) / 1e9
        return found


class SubsetTiming(L.LightningModule):
    """Measures the time per image of the vision side with subsets of experts, encoders live, on the first batch.

    The subsets take turns, so that changes of the machine's load affect all of them alike. A subset's time is the
    median of its ratio to the encoder's alone in the same turn, times the latter's median.

    Args:
        model: The trained model.
        images: Images per call.
        turns: Fewest turns, after one to warm up.
        seconds: Shortest time to measure for.
    """

    def __init__(self, model: FusingMethod, *, images: int, turns: int = 7, seconds: float = 2.0) -> None:
        super().__init__()
        self.model, self.images, self.turns, self.seconds = model, images, turns, seconds
        self.subsets: tuple[Subset, ...] = ((),)
        self.milliseconds: Mapping[Subset, float] = {}
        self.unsteadiness: Mapping[Subset, float] = {}
        """By subset, the larger of the spread of its repeats and the share of the machine that other processes used."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure all subsets on the first process; the empty one must be among them."""
        if not is_first():
            return
        live = replace(first_images(batch, self.images), split="")  # no cache knows this split
        turns: list[dict[Subset, float]] = []
        meanwhile = Meanwhile()
        started = time.perf_counter()
        while len(turns) < 1 + self.turns or time.perf_counter() - started < self.seconds:
            turns.append({subset: self._seconds(subset, live) for subset in self.subsets})
        clip_ms = 1000 * statistics.median(turn[()] for turn in turns[1:]) / len(live)
        self.milliseconds = {
            subset: clip_ms * statistics.median(turn[subset] / turn[()] for turn in turns[1:])
            for subset in self.subsets
        }
        others = meanwhile.others_share() or 0.0
        self.unsteadiness = {
            subset: max(others, spread_of([turn[subset] for turn in turns[1:]])) for subset in self.subsets
        }

    def _seconds(self, subset: Subset, batch: Batch) -> float:
        self.model.hub.attach_only(subset)
        self._wait()
        started = time.perf_counter()
        self.model.encode(batch)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def run_once(modules: Iterable[nn.Module], work: Callable[[], int] = int) -> Iterator[list[int]]:
    """Run each module at most once and return the same output on later calls: for one batch, without gradients.

    Args:
        modules: The modules, none inside another.
        work: Reads how much work was done so far.

    Yields:
        The work that each later call would have done, in order.
    """
    patched, spared = list(modules), list[int]()
    for module in patched:
        module.forward = _remembered(module.forward, work, spared)
    try:
        yield spared
    finally:
        for module in patched:
            del module.forward  # uncovers the class's own


def _remembered(forward: Callable[..., Any], work: Callable[[], int], spared: list[int]) -> Callable[..., Any]:
    answers: list[tuple[Any, int]] = []

    @functools.wraps(forward)
    def once(*inputs: Any, **named: Any) -> Any:
        if answers:
            answer, done = answers[0]
            spared.append(done)
            return answer
        before = work()
        answer = forward(*inputs, **named)
        answers.append((answer, work() - before))
        return answer

    return once
