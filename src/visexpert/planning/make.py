"""From a configuration to its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from visexpert.errors import ConfigError
from visexpert.methods import ROLES, Method, Part
from visexpert.planning.amount import Amount, amount_of, configured_gpus, data_needs, image_size_of, stored_bytes
from visexpert.planning.counting import OTHER, StepCost, count_step
from visexpert.planning.machine import Precision, Strategy, gpu_named
from visexpert.planning.memory import memory_per_gpu
from visexpert.planning.plan import Asked, Configured, Disk, Plan, Row
from visexpert.planning.read import Planned
from visexpert.types import IGNORE_INDEX, Batch, TextBatch


def make_plan(planned: Planned, asked: Asked) -> Plan:
    """Return the plan of a configuration.

    Raises:
        ConfigError: A strategy, precision, accelerator or length is unknown or impossible.
    """
    method, trainer = planned.method, planned.trainer
    strategy, precision = Strategy.of(trainer.get("strategy")), Precision.of(trainer.get("precision"))
    gpu = gpu_named(asked.gpu)
    amount = amount_of(planned.data, trainer, gpus=asked.gpus, samples=asked.samples)
    own_gpus, configured = configured_gpus(trainer), None
    if own_gpus not in (None, asked.gpus):
        configured = Configured(own_gpus, amount_of(planned.data, trainer, gpus=own_gpus, samples=asked.samples))
    ready_to_train(method)
    trained, parts = trained_parameters(method), find_parts(method)
    side = image_size_of(planned.data) or method.clip.image_size
    mixed = precision.mixed and strategy.engine != "deepspeed"  # which lowers everything, without autocast
    cost = _count(method, parts, asked, precision, side, mixed=mixed)
    stored = {}
    if method.feature_cache is not None:
        stored = stored_bytes(method, dtype=method.feature_cache.dtype)
    memory = memory_per_gpu(
        method,
        trained,
        strategy=strategy,
        precision=precision,
        gpus=asked.gpus,
        activation_bytes=cost.activation_bytes,
        batch_size=amount.batch_size,
        packed=method.language.packed_weights(),
    )
    return Plan(
        method=type(method).__name__,
        rows=_rows(parts, trained, cost, stored),
        amount=amount,
        memory=memory,
        disk=_disk(planned, trained, stored, amount),
        gpu=gpu,
        asked=asked,
        strategy=strategy,
        precision=precision,
        activation_bytes=cost.activation_bytes,
        image_size=side,
        configured=configured,
    )


def _count(
    method: Method, parts: list[Part], asked: Asked, precision: Precision, side: int, *, mixed: bool
) -> StepCost:
    batch = sample_of(method, text_tokens=asked.text_tokens, answer_tokens=asked.answer_tokens, image_size=side)
    modules = {part.name: part.modules for part in parts}
    return count_step(lambda: method.step(batch).loss, method, modules, float_bytes=precision.compute, mixed=mixed)


def _rows(parts: list[Part], trained: list[nn.Parameter], cost: StepCost, stored: Mapping[str, int]) -> list[Row]:
    counts = parameter_counts(parts, trained)
    rows = [
        Row(
            part.name,
            part.role,
            counts[part.name].trained,
            counts[part.name].frozen,
            cost.forward.get(part.name, 0) / 1e9,
            cost.backward.get(part.name, 0) / 1e9,
            part.name in stored,
        )
        for part in sorted(parts, key=lambda part: ROLES.index(part.role))
    ]
    rest = Row(OTHER, "", 0, 0, cost.forward.get(OTHER, 0) / 1e9, cost.backward.get(OTHER, 0) / 1e9, False)
    return [*rows, rest] if rest.training else rows


def _disk(planned: Planned, trained: list[nn.Parameter], stored: Mapping[str, int], amount: Amount) -> Disk:
    frozen, method = tuple(planned.method.frozen_modules()), planned.method
    kept = {key: value for key, value in method.state_dict().items() if key.split(".", 1)[0] not in frozen}
    learned = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    everything = sum(parameter.numel() * parameter.element_size() for parameter in method.parameters())
    states = 2.0 * learned
    store = 0.0 if not stored else None if amount.rows is None else float(amount.rows * sum(stored.values()))
    checkpoint = sum(value.numel() * value.element_size() for value in kept.values()) + states
    return Disk(checkpoint, float(everything - learned), store, data_needs(planned.data))


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a part.

    Args:
        trained: Parameters that the optimizer gets.
        frozen: All others.
    """

    trained: int
    frozen: int


def ready_to_train(method: Method) -> None:
    """Freeze and unfreeze as a fit does, without reading weights."""
    method.mark_loaded()
    method.init_from = None
    method.setup("fit")
    method.train()


def trained_parameters(method: Method) -> list[nn.Parameter]:
    """Return the parameters that the optimizer gets, each once; call :func:`ready_to_train` first."""
    modules = [module for group in method.trained_groups() for module in group.modules]
    found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def find_parts(method: Method) -> list[Part]:
    """Return the method's parts that have parameters."""
    return [part for part in method.parts() if any(True for module in part.modules for _ in module.parameters())]


def parameter_counts(parts: list[Part], trained: list[nn.Parameter]) -> dict[str, Counts]:
    """Count parameters by part; a shared one counts in the first part that has it."""
    learning, seen = {id(parameter) for parameter in trained}, set[int]()
    counts: dict[str, Counts] = {}
    for part in parts:
        sums = {True: 0, False: 0}
        for parameter in (parameter for module in part.modules for parameter in module.parameters()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                sums[id(parameter) in learning] += parameter.numel()
        counts[part.name] = Counts(trained=sums[True], frozen=sums[False])
    return counts


def sample_of(method: Method, *, text_tokens: int, answer_tokens: int | None, image_size: int) -> Batch:
    """Return a batch of one sample, pixels on ``meta`` and ids real, for the method's own step.

    Args:
        method: The method; its language model limits the length of an item, so a longer text becomes several items.
        text_tokens: Tokens of the image's texts, all items together.
        answer_tokens: Supervised tokens among them; None for half.
        image_size: Side of the image in pixels.

    Raises:
        ConfigError: There are too few tokens, or too many answer tokens.
    """
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    text = _text(text_tokens, answer_tokens, method.language.max_tokens) if method.reads_text else None
    return Batch(image, torch.zeros(1, dtype=torch.long), split="", text=text)


def _text(tokens: int, answers: int | None, longest: int | None) -> TextBatch:
    answers = tokens // 2 if answers is None else answers
    if tokens < 2 or not 0 < answers < tokens:
        raise ConfigError(
            f"text_tokens must be at least 2, and answer_tokens at least 1 and below text_tokens; got {tokens} and "
            f"{answers}."
        )
    count = 1 if longest is None else -(-tokens // longest)
    ends = [round(tokens * (item + 1) / count) for item in range(count)]
    answered = [round(answers * (item + 1) / count) for item in range(count)]
    labels, segments, positions = [], [], []
    for item, (end, done) in enumerate(zip(ends, answered, strict=True)):
        length = end - (ends[item - 1] if item else 0)
        labeled = min(done - (answered[item - 1] if item else 0), length - 1)
        labels += [IGNORE_INDEX] * (length - labeled) + [1] * labeled
        segments += [item + 1] * length
        positions += list(range(length))
    rows = (torch.tensor([values]) for values in ([1] * tokens, labels, segments, positions))
    return TextBatch(*rows)
