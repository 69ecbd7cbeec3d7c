"""Cost of a model: parameters, GFLOP and images per second at inference, GFLOP of training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from visexpert.methods.base import Method
from visexpert.timing import OTHERS, SPREAD, Meanwhile, spread_of
from visexpert.types import Batch, TextBatch, VisionTokens

LEAST_REPEATS = 5


def parameter_counts(method: Method) -> dict[str, float]:
    """Count the parameters: ``trained``; ``inference`` (what a deployed model loads); ``total`` (in training).

    Experts in use count for ``inference``; teachers and detached experts count for ``total`` only.
    """
    trained = {id(p) for group in method.trained_groups() for module in group.modules for p in module.parameters()}
    unused = {id(p) for module in method.unused_modules() for p in module.parameters()}
    parameters = {id(p): p.numel() for p in method.parameters()}
    return {
        "parameters_trained": float(sum(n for key, n in parameters.items() if key in trained)),
        "parameters_inference": float(sum(n for key, n in parameters.items() if key not in unused)),
        "parameters_total": float(sum(parameters.values())),
    }


@torch.no_grad()
def measure_cost(method: Method, batch: Batch, *, seconds: float = 1.0) -> dict[str, float]:
    """Measure the cost of one image at inference, without a store.

    GFLOP counts a multiply-add as 2, over matrix products, convolutions and attention (torch's FlopCounterMode), for
    the vision side and for the language model on the batch's own text. Images per second are of the vision side on this
    machine, from the median of the repeats: compare them only within one run of a benchmark. Two numbers tell how far
    to trust them: the spread of the repeats (interquartile range over median) and, on Linux, the share of the machine
    used by other processes.

    Args:
        method: In eval mode.
        batch: A few images with text; its cache key is ignored.
        seconds: Time to spend on measuring the speed.
    """
    images = live(batch)
    vision, vision_gflop = _counted(method, images)
    with inference_counter() as language_counter:
        if method.reads_text and batch.text is not None:
            method.language(vision, batch.text)
    times, others = _repeated(method, images, seconds)
    return {
        "gflop_vision": vision_gflop,
        "gflop_language": language_counter.get_total_flops() / len(batch) / 1e9,
        "images_per_s": len(batch) / statistics.median(times),
        SPREAD: spread_of(times),
        **({} if others is None else {OTHERS: others}),
        **parameter_counts(method),
    }


def _counted(method: Method, images: Batch) -> tuple[VisionTokens, float]:
    """Return the output of the vision side, and its GFLOP per image."""
    with inference_counter() as counter:
        vision = method.encode(images)
    return vision, counter.get_total_flops() / len(images) / 1e9


@contextmanager
def inference_counter() -> Iterator[FlopCounterMode]:
    """Count the work of a model at inference, as :func:`measure_cost` does."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _repeated(method: Method, images: Batch, seconds: float) -> tuple[list[float], float | None]:
    """Time the vision side repeatedly; also return the share of the machine that other processes used meanwhile."""
    times: list[float] = []
    meanwhile = Meanwhile()
    while len(times) < (LEAST_REPEATS if seconds else 2) or sum(times) < seconds:
        started = time.perf_counter()
        method.encode(images)
        if images.images_BCHW.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times, meanwhile.others_share()


@torch.no_grad()
def cached_gflop(method: Method, batch: Batch) -> float:
    """Return what a training step saves per image by reading frozen tokens from the store, in GFLOP.

    Args:
        method: With its store open; its mode and the random state are restored.
        batch: A few training images with their text.
    """
    if method.feature_cache is None:
        return 0.0
    mode = method.training
    devices = [batch.images_BCHW.device] if batch.images_BCHW.is_cuda else []
    method.eval()  # running statistics must not change
    try:
        with torch.random.fork_rng(devices=devices):
            with step_counter() as computed:
                method.step(live(batch))
            with step_counter() as as_run:
                method.step(batch)
    finally:
        method.train(mode)
    saved: int = computed.get_total_flops() - as_run.get_total_flops()
    return saved / len(batch) / 1e9


def step_counter() -> FlopCounterMode:
    """Return torch's counter, extended by fused attention on the CPU, which torch does not count."""
    aten = torch.ops.aten
    ours: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=ours)


def first_images(batch: Batch, count: int) -> Batch:
    """Return the first images of a batch, with their text."""
    text = batch.text
    cut = None
    if text is not None:
        cut = TextBatch(
            text.ids_BN[:count], text.labels_BN[:count], text.segments_BN[:count], text.positions_BN[:count]
        )
    return Batch(batch.images_BCHW[:count], batch.index_B[:count], batch.split, text=cut)


def live(batch: Batch) -> Batch:
    """Return the same batch without a split, so that no store has its images."""
    return Batch(batch.images_BCHW, batch.index_B, split="", text=batch.text, has_image_B=batch.has_image_B)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Count from shapes, which FlopCounterMode passes."""
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
