"""Operations and activations of one step by part, counted without computing anything."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visexpert.planning.attribution import Attribution
from visexpert.planning.live import LiveTensors
from visexpert.planning.metamode import MetaMode, RealNumbers


@dataclass(frozen=True)
class StepCost:
    """What a step costs.

    Args:
        forward: FLOP by part in the forward pass; 1 multiply-add counts as 2.
        backward: In the backward pass, what gradient checkpointing computes again included.
        activation_bytes: Most that results of operations take at once.
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    activation_bytes: int

    def total(self, part: str) -> int:
        """FLOP of a part in both passes."""
        return self.forward.get(part, 0) + self.backward.get(part, 0)


def count_step(
    step: Callable[[], Any], model: nn.Module, parts: Mapping[str, Sequence[nn.Module]], *, float_bytes: int = 4
) -> StepCost:
    """Run a step on ``meta`` and count.

    torch's ``FlopCounterMode`` counts matrix products, convolutions and attention. Attention is counted as the
    products that it is made of: causal attention in full, and its backward pass without what fused kernels compute
    again (methods of counting differ there by half of attention's share).

    Args:
        step: Calls the model; where it returns a tensor with a graph, that is differentiated.
        model: With its parameters on ``meta`` (see :func:`~visexpert.planning.weightless.weightless`).
        parts: Modules by the name of their part; a part may lie inside another.
        float_bytes: Bytes of a floating-point activation.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attribution, counter = Attribution(parts), FlopCounterMode(display=False)
    live = LiveTensors(float_bytes=float_bytes, weights=[*model.parameters(), *model.buffers()])
    spent: dict[bool, dict[str, int]] = {False: defaultdict(int), True: defaultdict(int)}
    before = [0]

    def start() -> None:
        before[0] = counter.get_total_flops()

    def note(result: Any) -> None:
        backward = attribution.is_backward
        if flop := counter.get_total_flops() - before[0]:
            spent[backward][attribution.now] += flop
        live.add(result, is_backward=backward)

    with ExitStack() as inside:
        for context in (_quiet(), _no_gradients_kept(trained), sdpa_kernel(SDPBackend.MATH), attribution.watching()):
            inside.enter_context(context)
        for mode in (RealNumbers(), live.scores, counter, MetaMode(before=start, after=note)):
            inside.enter_context(mode)
        result = step()
        if isinstance(result, Tensor) and result.requires_grad:
            result.sum().backward()
    return StepCost(dict(spent[False]), dict(spent[True]), live.peak)


@contextmanager
def _no_gradients_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of weights are counted by themselves."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Alarms about values mean nothing where there are none."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
