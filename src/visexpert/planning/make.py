"""From a configuration to its plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from visexpert.methods import ROLES, Method, Part
from visexpert.planning.amount import Amount, amount_of, configured_gpus, data_needs, image_size_of, stored_bytes
from visexpert.planning.attribution import OTHER
from visexpert.planning.counting import StepCost, count_step
from visexpert.planning.hardware import gpu_named
from visexpert.planning.memory import memory_per_gpu
from visexpert.planning.parts import find_parts, parameter_counts, ready_to_train, trained_parameters
from visexpert.planning.plan import Asked, Configured, Disk, Plan, Row
from visexpert.planning.read import Planned
from visexpert.planning.sample import sample_of
from visexpert.planning.strategy import Precision, Strategy

PACKED = {"nf4": 0.52, "int8": 1.0}
"""Bytes of a number of a quantized weight; nf4 with doubly quantized constants takes 4.13 bits (QLoRA, section 3)."""


def make_plan(planned: Planned, asked: Asked) -> Plan:
    """Count everything of a configuration.

    Raises:
        ConfigError: A strategy, a precision, an accelerator or a length that is not known or cannot be.
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
    cost = _count(method, parts, asked, precision, side)
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
        packed=_packed(planned),
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


def _count(method: Method, parts: list[Part], asked: Asked, precision: Precision, side: int) -> StepCost:
    batch = sample_of(method, text_tokens=asked.text_tokens, answer_tokens=asked.answer_tokens, image_size=side)
    modules = {part.name: part.modules for part in parts}
    return count_step(lambda: method.step(batch).loss, method, modules, float_bytes=precision.compute)


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


def _packed(planned: Planned) -> dict[int, float]:
    """Weights of a language model that is held in fewer bits: matrices of its blocks, which do not train."""
    size = PACKED.get(str(planned.model_setting("language", "quantization")))
    if size is None:
        return {}
    blocks = (p for n, p in planned.method.language.named_parameters() if ".layers." in n and p.ndim == 2)
    return {id(parameter): size for parameter in blocks if not parameter.requires_grad}
