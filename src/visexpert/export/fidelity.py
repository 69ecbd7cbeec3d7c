"""How far an export's outputs are from the model's own, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import WeightsError

TOLERANCE = 1e-4
"""Largest error allowed over the root mean square of the reference. Float32 weights must give float32's rounding: on a
random ViT-L/14 (24 layers) transformers and open_clip differ by 3e-6, transformers and float64 by 3e-6. Weights rounded
to float16 differ by 2e-3, GELU in place of quick-GELU by more."""

PHOTO_LEVELS = 2.0
"""Tolerance of preprocessing on photos, in levels of 0-255: image libraries resize in two passes and round to whole
levels after each, visexpert resizes in floating point."""


@dataclass(frozen=True)
class Difference:
    """Distance of an output from its reference.

    Args:
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        relative: ``max_abs`` over the root mean square of the reference: what the tolerance is compared with.
        min_cosine: Smallest cosine of an output vector with its reference.
        mean_cosine: Mean cosine.
    """

    max_abs: float
    mean_abs: float
    relative: float
    min_cosine: float
    mean_cosine: float


def difference(output: Tensor, reference: Tensor) -> Difference:
    """Compare vectors (..., D); computed in float64."""
    ours, theirs = reference.double(), output.double()
    error = (theirs - ours).abs()
    cosine = F.cosine_similarity(theirs, ours, dim=-1)
    scale = float(ours.square().mean().sqrt())
    largest = float(error.max())
    relative = largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))
    return Difference(largest, float(error.mean()), relative, float(cosine.min()), float(cosine.mean()))


def compare(
    outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, tolerance: float, what: str
) -> dict[str, dict[str, float]]:
    """Differences of all outputs.

    Args:
        outputs: What the reloaded export gave.
        reference: What the model itself gives; each of its names must be among ``outputs``.
        tolerance: Largest ``relative`` allowed.
        what: Name of the export, for messages.

    Raises:
        WeightsError: An output is absent, of another shape, or too far away.
    """
    found: dict[str, dict[str, float]] = {}
    for name, expected in reference.items():
        if name not in outputs or outputs[name].shape != expected.shape:
            shape = tuple(outputs[name].shape) if name in outputs else "nothing"
            raise WeightsError(
                f"The {what} export gave {shape} for {name} instead of {tuple(expected.shape)} after reloading; "
                "nothing was written."
            )
        entry = difference(outputs[name], expected)
        if not entry.relative <= tolerance:  # written so that NaN fails, too
            raise WeightsError(
                f"The {what} export differs after reloading: the error of {name} is {entry.relative:.2g} of its root "
                f"mean square, allowed is {tolerance:.2g}; nothing was written (--tolerance sets another limit)."
            )
        found[name] = asdict(entry)
    return found


def levels(processed_BCHW: Tensor, expected_BCHW: Tensor, std: Tensor) -> float:
    """Largest difference of two preprocessed images in levels of 0-255; infinite for another shape."""
    if processed_BCHW.shape != expected_BCHW.shape:
        return float("inf")
    return float(((processed_BCHW - expected_BCHW) * std).abs().max()) * 255.0


def check_levels(found: Mapping[str, float], *, what: str) -> None:
    """Refuse a processor that differs by more than :data:`PHOTO_LEVELS` on photos.

    Raises:
        WeightsError: It does.
    """
    for name, value in found.items():
        if name != "photo_noise" and not value <= PHOTO_LEVELS:
            raise WeightsError(
                f"The {what} export's image processor differs by {value:.1f} of 255 levels on {name}, allowed are "
                f"{PHOTO_LEVELS:g}; nothing was written."
            )


def equal_ids(output: Tensor, expected: Tensor, *, what: str) -> None:
    """Refuse a processor that makes other token ids.

    Raises:
        WeightsError: It does.
    """
    if not torch.equal(output, expected):
        raise WeightsError(
            f"The {what} export's processor ends a text in the token ids {output.flatten()[-8:].tolist()}, the run's "
            f"tokenizer in {expected.flatten()[-8:].tolist()}; nothing was written."
        )
