"""Pure functions: tensors in, scalar out."""

from visexpert.losses.distill import (
    across_image_variance,
    cls_token_weights,
    feature_kd,
    gated_kd,
    teacher_weights,
    uniform_teacher_weights,
)
from visexpert.losses.terms import gate_balance, normalized_mse, router_balance, text_loss, token_distance, token_nll

__all__ = [
    "across_image_variance",
    "cls_token_weights",
    "feature_kd",
    "gate_balance",
    "gated_kd",
    "normalized_mse",
    "router_balance",
    "teacher_weights",
    "text_loss",
    "token_distance",
    "token_nll",
    "uniform_teacher_weights",
]
