"""One training step: what a method sees and compares, its loss, what is logged, and the guard against NaN."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Literal, TypeVar, get_args

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.io.run_files import append_lines
from visexpert.losses import router_balance
from visexpert.losses.terms import RouterBalanceForm
from visexpert.metrics.records import gathered
from visexpert.types import Batch, Unit, VisionTokens
from visexpert.vision import RoutingRecord, Views

log = logging.getLogger(__name__)

OnNan = Literal["stop", "skip"]

FILE = "not_finite.jsonl"
"""File of a run's folder that lists the batches of skipped steps, one a line."""

MOST_IN_A_ROW = 10
"""Most steps in a row that ``skip`` skips; one more ends the run."""

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss.

    Args:
        value: Scalar, the mean over the batch's tokens or images; 0 if it has none.
        unit: What it is a mean over.
        weight: Its weight in the loss.
    """

    value: Tensor
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """Output of a method's step.

    Args:
        terms: Terms of the loss by name, at least one.
        batch_size: Number of images.
        watched: Other scalars to log, by name, without a graph.
    """

    terms: Mapping[str, LossTerm]
    batch_size: int
    watched: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def loss(self) -> Tensor:
        """The loss of this batch alone, scalar."""
        return self.shared({})

    @property
    def parts(self) -> dict[str, Tensor]:
        """All scalars to log: the unweighted terms and the watched scalars."""
        return {name: term.value for name, term in self.terms.items()} | dict(self.watched)

    def shared(self, shares: Mapping[Unit, float | Tensor]) -> Tensor:
        """Return the loss with each term scaled by the share of its unit (1 if not given)."""
        scaled = [term.weight * shares.get(term.unit, 1.0) * term.value for term in self.terms.values()]
        return reduce(torch.add, scaled)


@dataclass(frozen=True)
class Seen:
    """A batch and its tokens, before the language model reads them.

    Args:
        batch: The batch.
        views: Its images as the encoder sees them: whole, or whole and in tiles.
        tokens: Tokens (V, T, D) of all views; D is d_lang if the method already projects them.
        routing: Decisions of the routers of a student with MoLE; None if there are none, or they were not recorded.
    """

    batch: Batch
    views: Views
    tokens: VisionTokens
    routing: RoutingRecord | None = None


@dataclass(frozen=True)
class Compared:
    """A method's own losses on a batch.

    Args:
        terms: Terms of the loss by name.
        watched: Other scalars to log, by name, without a graph.
    """

    terms: Mapping[str, LossTerm] = field(default_factory=dict)
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterBalance:
    """How the routers of a student with MoLE are balanced.

    Args:
        weight: Weight of the balance loss, above 0.
        form: ``pooled`` or ``per_layer``.
    """

    weight: float
    form: RouterBalanceForm

    def term(self, seen: Seen) -> LossTerm:
        """Return the balance loss over the views of samples with an image."""
        assert seen.routing is not None
        there_V = seen.views.batch.has_image_B
        value = router_balance(seen.routing.probs_LBNE, seen.routing.choice_LBN, self.form, has_image_B=there_V)
        return LossTerm(value, "image", self.weight)


def loss_over_processes(output: StepOutput, counts: Mapping[Unit, int], *, together: bool) -> Tensor:
    """Return the loss of the batches of all processes, taken as one batch; the host does not wait for the device.

    Args:
        output: Output of this process.
        counts: Number of tokens and images that its terms are means over.
        together: Whether there are several processes; every one must call this.
    """
    if not together:
        return output.loss.detach()
    own = output.loss.detach().float()
    units: tuple[Unit, ...] = get_args(Unit)
    sums = {unit: torch.zeros_like(own) for unit in units}
    for term in output.terms.values():
        sums[term.unit] = sums[term.unit] + term.weight * term.value.detach().float()
    counted = own.new_tensor([counts[unit] for unit in units])
    totals = torch.cat([torch.stack([sums[unit] for unit in units]) * counted, counted])
    dist.all_reduce(totals)
    summed, counted = totals.chunk(2)
    return (summed / counted.clamp_min(1)).sum()


def parts_over_processes(output: StepOutput, counts: Mapping[Unit, int], *, together: bool) -> dict[str, float]:
    """Return the parts to log, each a mean over all processes; watched scalars are weighted by the number of images.

    Processes may have different parts: a batch without an image has no balance and no distillation loss. Parts that no
    process has a number for are left out: a watched scalar is NaN if there are too few images for it.

    Args:
        output: Output of this process.
        counts: Number of tokens and images that its terms are means over.
        together: Whether there are several processes; every one must call this.
    """
    values = on_host(output.parts)
    own = {name: (values[name], counts[term.unit]) for name, term in output.terms.items()}
    own |= {name: (values[name], 0 if math.isnan(values[name]) else counts["image"]) for name in output.watched}
    sums: dict[str, tuple[float, int]] = {}
    for parts in gathered(own) if together else [own]:
        for name, (value, count) in parts.items():
            total, counted = sums.get(name, (0.0, 0))
            sums[name] = (total + value * count, counted + count) if count else (total, counted)
    return {name: total / counted for name, (total, counted) in sums.items() if counted}


def on_host(values: Mapping[_Key, Tensor]) -> dict[_Key, float]:
    """Return scalars as numbers; the host waits for the device once."""
    if not values:
        return {}
    together = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


def sums_over_processes(own: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over processes of values that each has under the same names."""
    everything = gathered(dict(own))
    return {name: sum(values[name] for values in everything) for name in own}


@dataclass(frozen=True)
class Noted:
    """A batch of the current optimizer step, still on its device."""

    index_B: Tensor
    split: str
    source: str
    loss: Tensor
    parts: dict[str, Tensor]


class FiniteGuard:
    """Keeps NaN and infinity out of the weights: checks each optimizer step before it is taken.

    Args:
        on_nan: ``stop`` ends the run, ``skip`` skips the step.
    """

    def __init__(self, on_nan: OnNan) -> None:
        self.on_nan: OnNan = on_nan
        self.skipped = self.in_a_row = 0
        self._batches: list[Noted] = []

    def note(self, batch: Batch, output: StepOutput) -> None:
        """Keep the losses of a batch until its optimizer step."""
        parts = {name: value.detach() for name, value in output.parts.items()}
        self._batches.append(Noted(batch.index_B, batch.split, batch.source, output.loss.detach(), parts))

    def look(self, module: L.LightningModule) -> None:
        """Check the losses since the last optimizer step, and the gradients; all processes decide alike.

        Under float16 gradients are not checked: the scaler skips those that overflow and adapts its scale to them.

        Raises:
            DataError: They are not finite, and ``on_nan`` is ``stop``; or too many steps in a row were skipped.
        """
        batches, self._batches = self._batches, []
        trainer = module.trainer
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        sums = [noted.loss.float() for noted in batches] + ([] if scaled else _norms(module.parameters()))
        if not sums:
            return
        good = torch.stack([value.to(sums[0].device) for value in sums]).isfinite().all()
        wrong = (~good).float()
        if trainer.world_size > 1:
            wrong = trainer.strategy.reduce(wrong, reduce_op="sum")
        if not float(wrong):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        where = _write(trainer, batches)
        what = "a loss" if not all(math.isfinite(float(noted.loss)) for noted in batches) else "a gradient"
        begin = f"Step {trainer.global_step} has {what} that is NaN or infinite on some process (its rows: {where})"
        advice = "lower lr, clip gradients, use bf16-mixed or float32, or look at these rows"
        if self.on_nan == "stop":
            raise DataError(
                f"{begin}; the step was not taken, weights and checkpoints are sound: {advice}, then continue with "
                "ckpt_path last, or skip such steps with on_nan: skip."
            )
        if self.in_a_row > MOST_IN_A_ROW:
            raise DataError(f"{begin}, like the {MOST_IN_A_ROW} skipped steps before it: {advice}.")
        log.warning("%s; the step is skipped (%d so far).", begin, self.skipped)
        if not scaled:
            for parameter in module.parameters():
                parameter.grad = None

    def check_weights(self, module: L.LightningModule) -> None:
        """Check that the trained weights are finite before they are saved, so that the last checkpoint stays sound.

        Raises:
            DataError: Some are NaN or infinite.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
        trained = {name: norm for name, p in named for norm in _norms([p], own=True)}
        if not trained:
            return
        good = torch.stack([value.to(next(iter(trained.values())).device) for value in trained.values()]).isfinite()
        wrong = (~good.all()).float()
        trainer = module._trainer
        if trainer is not None and trainer.world_size > 1:
            # A trainer that has ended leaves the weights on the host, which NCCL does not reach.
            wrong = trainer.strategy.reduce(wrong.to(trainer.strategy.root_device), reduce_op="sum")
        if float(wrong):
            names = [name for name, fine in zip(trained, good.tolist(), strict=True) if not fine]
            raise DataError(
                f"Training has made weights NaN or infinite ({', '.join(names[:3]) or 'on another process'}); they are "
                "not saved, the last checkpoint is sound: lower lr or clip gradients, and continue from it."
            )


def refuse_engines(strategy: Strategy, *, on_nan: OnNan, frozen_steps: int, splits_itself: bool = False) -> None:
    """Check that the strategy can split the model, and that gradients can be dropped, if the settings need it.

    Args:
        strategy: The trainer's.
        on_nan: ``skip`` drops the gradients of a step.
        frozen_steps: Steps that drop the gradients of the language model.
        splits_itself: Whether the method has a ``configure_model`` of its own.

    Raises:
        ConfigError: It cannot, or they cannot: DeepSpeed and FSDP keep gradients to themselves.
    """
    if isinstance(strategy, ModelParallelStrategy) and not splits_itself:
        raise ConfigError(
            "ModelParallelStrategy lets a method split itself (configure_model), which ours do not; use strategy fsdp, "
            "or ddp."
        )
    if not isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        return
    engine = type(strategy).__name__
    if frozen_steps > 0:
        raise ConfigError(
            f"language_frozen_steps={frozen_steps} drops the gradients of the language model, which {engine} keeps to "
            "itself; set it to 0, or train with strategy ddp."
        )
    if on_nan == "skip":
        raise ConfigError(
            f"on_nan: skip drops gradients, which {engine} keeps to itself; use on_nan: stop, or strategy ddp."
        )


def _norms(parameters: Iterable[nn.Parameter], *, own: bool = False) -> list[Tensor]:
    """Return norms of the gradients, or of the parameters (``own``), each finite if all its values are."""
    found = [p.detach() if own else p.grad for p in parameters if own or p.grad is not None]
    tensors = [value for value in found if value is not None and value.numel() and value.is_floating_point()]
    return [] if not tensors else list(torch._foreach_norm(tensors, float("inf")))


def _write(trainer: L.Trainer, batches: Iterable[Noted]) -> Path:
    """Append the batches of a step to the list of this process; return its path."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir must be read by every process
    path = folder / (FILE if trainer.global_rank == 0 else FILE.replace(".", f".rank{trainer.global_rank}.", 1))
    lines = []
    for noted in batches:
        parts = {name: str(float(value)) for name, value in noted.parts.items()}
        lines.append(
            {
                "step": trainer.global_step,
                "split": noted.split,
                "source": noted.source,
                "rows": noted.index_B.tolist(),
                "loss": str(float(noted.loss)),
                "parts": parts,
            }
        )
    try:
        append_lines(path, map(json.dumps, lines))
    except DataError as error:
        log.warning("%s", error)
    return path
