"""Scores of generated text, as torchmetrics; each ``compute()`` gives a flat dict of floats without prefix."""

from __future__ import annotations

from visexpert.metrics.caption import CaptionScores
from visexpert.metrics.judged import JudgedCaptions
from visexpert.metrics.pope import POPEScores
from visexpert.metrics.probes import RidgeProbe, fit_ridge, ridge_accuracy, ridge_r2
from visexpert.metrics.smooth import SlotAccuracy, TokenNLL
from visexpert.metrics.vqa import VQAAccuracy, normalize_answer
from visexpert.metrics.vsr import VSRAccuracy

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
