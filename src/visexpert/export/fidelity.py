"""Fixed check inputs, and how far an export's outputs on them are, and may be, from the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import WeightsError
from visexpert.export.reload import BATCHES
from visexpert.export.source import ExportSource, reference_outputs
from visexpert.vision import VisionEncoder

TOLERANCE = 1e-4
"""Largest allowed error over the root mean square of the reference. Float32 weights differ by rounding only: on a
random ViT-L/14 (24 layers) transformers and open_clip differ by 3e-6, transformers and float64 by 3e-6. Weights rounded
to float16 differ by 2e-3, GELU in place of quick-GELU by more."""

PHOTO_LEVELS = 2.0
"""Tolerance of preprocessing on photos, in levels of 0-255: image libraries resize in two passes and round to integers
after each, visexpert resizes in floating point."""


@dataclass(frozen=True)
class Difference:
    """Distance of an output from its reference.

    Args:
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        relative: ``max_abs`` over the root mean square of the reference; the tolerance applies to this.
        min_cosine: Smallest cosine of an output vector with its reference.
        mean_cosine: Mean cosine.
    """

    max_abs: float
    mean_abs: float
    relative: float
    min_cosine: float
    mean_cosine: float


def difference(output: Tensor, reference: Tensor) -> Difference:
    """Compare vectors (..., D) in float64."""
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
    """Return the differences of all outputs.

    Args:
        outputs: Outputs of the reloaded export.
        reference: Outputs of the model itself; each name must be in ``outputs``.
        tolerance: Largest allowed ``relative``.
        what: Name of the export, for messages.

    Raises:
        WeightsError: An output is missing, has another shape, or differs too much.
    """
    found: dict[str, dict[str, float]] = {}
    for name, expected in reference.items():
        if name not in outputs or outputs[name].shape != expected.shape:
            shape = tuple(outputs[name].shape) if name in outputs else "nothing"
            raise WeightsError(
                f"After reloading, the {what} export gave {shape} for {name} instead of {tuple(expected.shape)}; "
                "nothing was written."
            )
        entry = difference(outputs[name], expected)
        if not entry.relative <= tolerance:  # NaN fails, too
            raise WeightsError(
                f"The {what} export differs after reloading: the error of {name} is {entry.relative:.2g} of its root "
                f"mean square, at most {tolerance:.2g} is allowed (tolerance); nothing was written."
            )
        found[name] = asdict(entry)
    return found


def levels(processed_BCHW: Tensor, expected_BCHW: Tensor, std: Tensor) -> float:
    """Return the largest difference of two preprocessed images in levels of 0-255; infinite if shapes differ."""
    if processed_BCHW.shape != expected_BCHW.shape:
        return float("inf")
    return float(((processed_BCHW - expected_BCHW) * std).abs().max()) * 255.0


def check_levels(found: Mapping[str, float], *, what: str) -> None:
    """Check that a processor differs by at most :data:`PHOTO_LEVELS` on photos.

    Raises:
        WeightsError: It differs by more.
    """
    for name, value in found.items():
        if name != "photo_noise" and not value <= PHOTO_LEVELS:
            raise WeightsError(
                f"The {what} export's image processor differs by {value:.1f} of 255 levels on {name}, at most "
                f"{PHOTO_LEVELS:g} are allowed; nothing was written."
            )


def equal_ids(output: Tensor, expected: Tensor, *, what: str) -> None:
    """Check that a processor gives the expected token ids.

    Raises:
        WeightsError: They differ.
    """
    if not torch.equal(output, expected):
        raise WeightsError(
            f"The {what} export's processor gives the last token ids {output.flatten()[-8:].tolist()}, the run's "
            f"tokenizer {expected.flatten()[-8:].tolist()}; nothing was written."
        )


SEED = 0


@dataclass(frozen=True)
class CheckInputs:
    """Inputs of one check.

    Args:
        images_BCHW: float in [0, 1] at the encoder's own size: scenes, noise, one flat image.
        photos: Scenes of other sizes, uint8 (H, W, 3), by name, for image processors.
        noise: Saturated noise in the same form, the worst case for a resize.
    """

    images_BCHW: Tensor
    photos: dict[str, Tensor]
    noise: dict[str, Tensor]


def check_inputs(side: int) -> CheckInputs:
    """Return the inputs for an encoder of ``side`` x ``side`` pixels; always the same ones."""
    generator = torch.Generator().manual_seed(SEED)
    count = sum(BATCHES)
    num_noise = count // 2
    scenes = [_scene((side, side), generator) for _ in range(count - num_noise - 1)]
    noise = [torch.rand(3, side, side, generator=generator) for _ in range(num_noise)]
    images_BCHW = torch.stack([*scenes, *noise, torch.full((3, side, side), 0.5)])
    sizes = {"photo_larger": (2 * side + 5, 3 * side), "photo_smaller": (side - side // 4, side + 7)}
    photos = {name: _to_bytes(_scene(size, generator)) for name, size in sizes.items()}
    static = torch.rand(3, 2 * side + 5, 3 * side, generator=generator)
    return CheckInputs(images_BCHW, photos, {"photo_noise": _to_bytes(static)})


def _scene(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a smooth background with two discs, (3, H, W) in [0.1, 0.9]."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    scene = F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0]
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in size), indexing="ij")
    for _ in range(2):
        u, v, radius = (torch.rand(3, generator=generator) * torch.tensor([1.4, 1.4, 0.4])).tolist()
        inside = (rows - v + 0.7) ** 2 + (columns - u + 0.7) ** 2 < (radius + 0.1) ** 2
        scene = torch.where(inside, torch.rand(3, 1, 1, generator=generator), scene)
    return scene.clamp(0.1, 0.9)


def _to_bytes(image_CHW: Tensor) -> Tensor:
    return (image_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


@torch.no_grad()
def differences(student: VisionEncoder, plain: VisionEncoder, layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the differences of a plain CLIP from the student on the check images, by output."""
    pixels_BCHW = student.preprocess(check_inputs(student.image_size).images_BCHW)
    ours, theirs = (
        reference_outputs(ExportSource(clip, tuple(layers), None, {}), pixels_BCHW) for clip in (student, plain)
    )
    return {name: asdict(difference(theirs[name], value)) for name, value in ours.items()}
