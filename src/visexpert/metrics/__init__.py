"""Scores of generated text, as torchmetrics; each ``compute()`` gives a flat dict of floats without prefix."""

from __future__ import annotations

from visexpert.metrics.answers import POPEScores, VQAAccuracy, VSRAccuracy, normalize_answer
from visexpert.metrics.caption import CaptionScores, JudgedCaptions
from visexpert.metrics.smooth import SlotAccuracy, TokenNLL
from visexpert.metrics.tokens import RidgeProbe, fit_ridge, ridge_accuracy, ridge_r2

__all__ = [
    "CaptionScores",
    "JudgedCaptions",
    "POPEScores",
    "RidgeProbe",
    "SlotAccuracy",
    "TokenNLL",
    "VQAAccuracy",
    "VSRAccuracy",
    "fit_ridge",
    "normalize_answer",
    "ridge_accuracy",
    "ridge_r2",
]
