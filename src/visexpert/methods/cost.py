"""What a model costs: parameters trained, parameters and GFLOP at inference, images per second."""

from __future__ import annotations

import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visexpert.methods.base import Method
from visexpert.types import Batch, TextBatch


def parameter_counts(method: Method) -> dict[str, float]:
    """Parameters by role: ``trained``, ``inference`` (all that a deployed model loads: experts in use included)."""
    trained = {id(p) for group in method.trained_groups() for module in group.modules for p in module.parameters()}
    unused = {id(p) for module in method.unused_modules() for p in module.parameters()}
    parameters = {id(p): p.numel() for p in method.parameters()}
    return {
        "parameters_trained": float(sum(n for key, n in parameters.items() if key in trained)),
        "parameters_inference": float(sum(n for key, n in parameters.items() if key not in unused)),
    }


@torch.no_grad()
def measure_cost(method: Method, batch: Batch, *, seconds: float = 1.0) -> dict[str, float]:
    """Cost of one image at inference, encoders live.

    GFLOP counts 1 multiply-add as 2, over matrix products, convolutions and attention (torch's FlopCounterMode), for
    the vision side and for the language side on the batch's own text. Images per second are those of the vision side
    on this machine, now: compare them only within one run of a benchmark.

    Args:
        method: In eval mode.
        batch: A few images with text; its cache key is ignored.
        seconds: Time to spend on measuring the speed.
    """
    live = Batch(batch.images_BCHW, batch.index_B, split="", text=batch.text)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as vision_counter:
        vision = method.encode(live)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as language_counter:
        if method.reads_text and batch.text is not None:
            method.language(vision, batch.text)
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < seconds:
        method.encode(live)
        if live.images_BCHW.is_cuda:
            torch.cuda.synchronize()
        rounds += 1
    elapsed = time.perf_counter() - started
    return {
        "gflop_vision": vision_counter.get_total_flops() / len(batch) / 1e9,
        "gflop_language": language_counter.get_total_flops() / len(batch) / 1e9,
        "images_per_s": rounds * len(batch) / elapsed,
        **parameter_counts(method),
    }


def first_images(batch: Batch, count: int) -> Batch:
    """The first images of a batch, with their text."""
    text = batch.text
    cut = None
    if text is not None:
        cut = TextBatch(
            text.ids_BN[:count], text.labels_BN[:count], text.segments_BN[:count], text.positions_BN[:count]
        )
    return Batch(batch.images_BCHW[:count], batch.index_B[:count], batch.split, text=cut)
