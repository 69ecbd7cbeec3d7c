"""Probes of a network: the shape of its output, found on ``meta`` without weights, and whether its output repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import pytorch_utils

from visexpert.errors import ConfigError, first_line
from visexpert.experts.base import VisionExpert

LONG = 1024
"""Least S at which S x S attention logits count as large: 16 heads of 1024 x 1024 take 64 MB per image in float32."""

RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_"}
    | {"multinomial", "normal", "normal_", "uniform_", "random_", "exponential_"}
)
"""Torch's functions that draw random numbers."""


def probe_map(network: nn.Module, image_size: int, *, owner: str) -> torch.Size:
    """Return the shape (1, E, h, w) of a network's output for one image, found on ``meta`` whatever its device.

    Args:
        network: Maps pixels (B, 3, H, W) to (B, E, h, w).
        image_size: Side of the image in pixels.
        owner: Name of the caller, for the message.

    Raises:
        ConfigError: The network cannot read such an image, does not give a map, draws random numbers, or would hold
            attention logits between S >= 1024 tokens in memory, S x S numbers per head.
    """
    try:
        with ChanceWatch() as chance, LogitsWatch(image_size) as watch:
            found = on_meta(network, image_size)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"{owner}: the model gives no feature map for images of {image_size} px ({_first_line(error)}); use "
            "another image_size or layer, or write an expert (docs/own-expert.md)."
        ) from error
    if chance.drawn:
        raise ConfigError(
            f"{owner}: the model draws random numbers ({chance.drawn}), so an image gets different tokens each time; "
            "use a model without random masks or dropout (for MAE, timm's vit_base_patch16_224.mae)."
        )
    if watch.largest:
        raise ConfigError(
            f"{owner}: at {image_size} px this model holds attention logits of shape {watch.largest} in memory; use a "
            "smaller image_size, or a model with windowed or fused attention (for SAM, TransformersExpert)."
        )
    if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != 1:
        raise ConfigError(f"{owner}: the model gives no feature map at {image_size} px; use another model or layer.")
    return found.shape


@torch.no_grad()
def on_meta(network: nn.Module, image_size: int) -> Any:
    """Return what a network gives for one image (1, 3, image_size, image_size), on ``meta`` whatever its device."""
    meta = {name: torch.empty_like(value, device="meta") for name, value in _tensors(network).items()}
    pixels_BCHW = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.device("meta"), uncached():
        return functional_call(network, meta, (pixels_BCHW,), tie_weights=False)


@contextmanager
def uncached() -> Iterator[None]:
    """Keep tensors out of transformers' caches, which live as long as the process.

    BEiT's cache is keyed by the size of the grid alone, not by device: an index on ``meta`` would later be used with
    real weights and give meaningless numbers.
    """
    with patch.object(pytorch_utils, "is_torchdynamo_compiling", return_value=True):  # which bypasses its caches
        yield


def probe_images(size: int, count: int = 2) -> Tensor:
    """Return images (count, 3, size, size) in [0, 1] with smooth and noisy parts, the same each time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return 0.7 * smooth + 0.3 * torch.rand(count, 3, size, size, generator=generator)


def check_repeats(expert: VisionExpert, name: str) -> None:
    """Check that an expert gives the same tokens twice: random masks, dropout and other random numbers show.

    Random generators are left in the state they were in. Experts on ``meta`` are not checked. If the expert cannot run
    on the device of its weights (code for GPUs only), a warning says that nothing was checked.

    Args:
        expert: Expert, with its weights loaded.
        name: Name of the expert in the hub, for messages.

    Raises:
        ConfigError: The tokens differ by more than rounding: by more than 1e-4 of the largest value, or 4 times the
            resolution of their dtype if that is more.
    """
    tensors = _tensors(expert)
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    image_BCHW = probe_images(expert.image_size, count=1).to(expert.mean.device)
    try:
        with torch.no_grad(), isolate_rng():
            encode = expert.forward  # bypasses hooks that count or time what a run encodes
            first, second = encode(image_BCHW).tokens_BSE, encode(image_BCHW).tokens_BSE
    except RuntimeError as error:  # NotImplementedError, of a kernel that this device lacks, is one
        rank_zero_warn(
            f"Expert '{name}' does not run on {expert.mean.device} ({first_line(error)}), so it was not checked that "
            "it gives the same tokens each time."
        )
        return
    what = f"Expert '{name}' ({type(expert).__name__}) gives different tokens for the same image each time"
    step = "switch off its random masks, dropout or other random numbers, or use another model."
    if first.shape != second.shape:
        raise ConfigError(f"{what} (of shape {tuple(first.shape)}, then {tuple(second.shape)}); {step}")
    same = (first == second) | (first.isnan() & second.isnan())
    difference = torch.where(same, 0.0, (first - second).abs().nan_to_num(torch.inf)).max().item()
    largest = first.abs().nan_to_num(0.0, posinf=0.0).max().item()
    if difference > max(1e-4, 4 * torch.finfo(first.dtype).eps) * largest:
        raise ConfigError(f"{what} (largest difference {difference:.3g}, largest value {largest:.3g}); {step}")


class ChanceWatch(TorchFunctionMode):
    """Watch for functions of torch that draw random numbers; dropout that is switched off does not."""

    drawn = ""
    """Name of the last such function; empty if there was none."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note whether it draws."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM:
            self.drawn = name
        elif "dropout" in name and torch.is_tensor(args[0] if args else None):
            training = kwargs.get("training", args[2] if len(args) > 2 else name == "dropout")
            share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            if training and share:
                self.drawn = name
        return func(*args, **kwargs)


class LogitsWatch(TorchFunctionMode):
    """Watch the results of torch's functions for (..., S, S) logits in memory; fused attention makes none.

    Args:
        image_size: Side of the images in pixels: their maps are square too, but are not logits.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.smallest = max(LONG, image_size + 1)
        self.largest: tuple[int, ...] = ()
        """Shape of the largest logits seen; empty if there were none."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and look at its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and self._are_logits(result) and result.numel() > _numel(self.largest):
            self.largest = tuple(result.shape)
        return result

    def _are_logits(self, tensor: Tensor) -> bool:
        if tensor.ndim < 3 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] < self.smallest:
            return False
        heads = tensor.numel() // tensor.shape[-1] ** 2
        # Views count by the memory behind them: a broadcast mask costs nothing. A single (S, S) may be a weight, or the
        # hidden layer of an MLP of width S.
        return heads > 1 and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _first_line(error: Exception) -> str:
    if "meta tensors" in str(error):
        return "its code depends on the values of pixels"
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel()) if shape else 0


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, a shared tensor under the name of each module that has it.

    A module in two places (CoaT's convolutions) comes once: swapped twice, it would keep the replacement.
    """
    return {
        f"{path}.{name}" if path else name: value
        for path, module in network.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, value in named(recurse=False, remove_duplicate=False)
    }
