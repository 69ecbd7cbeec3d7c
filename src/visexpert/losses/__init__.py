"""Pure functions: tensors in, scalar out."""

from visexpert.losses.agglomerative import kept_teachers, loss_shares, relation_errors, rescaled, summary_errors
from visexpert.losses.distill import (
    across_image_variance,
    across_image_variances,
    cls_token_weights,
    feature_errors,
    feature_kd,
    gated_kd,
    teacher_weights,
    uniform_teacher_weights,
)
from visexpert.losses.pooled import pooled_distance
from visexpert.losses.terms import gate_balance, normalized_mse, router_balance, text_loss, token_distance, token_nll

__all__ = [
    "across_image_variance",
    "across_image_variances",
    "cls_token_weights",
    "feature_errors",
    "feature_kd",
    "gate_balance",
    "gated_kd",
    "kept_teachers",
    "loss_shares",
    "normalized_mse",
    "pooled_distance",
    "relation_errors",
    "rescaled",
    "router_balance",
    "summary_errors",
    "teacher_weights",
    "text_loss",
    "token_distance",
    "token_nll",
    "uniform_teacher_weights",
]
