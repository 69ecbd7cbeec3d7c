"""Keeping an encoder's pooled embedding, which a text tower is aligned with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.types import imaged


def pooled_distance(student_BE: Tensor, frozen_BE: Tensor, *, has_image_B: Tensor | None = None) -> Tensor:
    """Return one minus the cosine of the student's embedding to the frozen one, mean over images.

    Args:
        student_BE: Pooled, projected embeddings of the student.
        frozen_BE: Those of the frozen encoder on the same images; they get no gradient.
        has_image_B: bool; samples without an image take no part. None: all have one.

    Returns:
        Scalar, float32; 0 (with a graph) if no sample has an image.

    Raises:
        ConfigError: The shapes differ.
    """
    if student_BE.shape != frozen_BE.shape:
        raise ConfigError(
            f"pooled_distance: the student's embeddings have shape {tuple(student_BE.shape)}, the frozen ones "
            f"{tuple(frozen_BE.shape)}; both must be of the same images and width."
        )
    student_BE, frozen_BE = imaged(student_BE, has_image_B), imaged(frozen_BE, has_image_B)
    if not len(student_BE):
        return student_BE.float().sum()
    return (1 - F.cosine_similarity(student_BE.float(), frozen_BE.detach().float(), dim=-1)).mean()
