"""Scores of generated text, as torchmetrics; each ``compute()`` gives a flat dict of floats without prefix."""

from __future__ import annotations

from visexpert.metrics.caption import CaptionScores
from visexpert.metrics.pope import POPEScores
from visexpert.metrics.probes import RidgeProbe, fit_ridge, ridge_accuracy, ridge_r2
from visexpert.metrics.scene import SceneCaptionAccuracy, caption_holds
from visexpert.metrics.smooth import SlotAccuracy, TokenNLL
from visexpert.metrics.vqa import VQAAccuracy, normalise_answer
from visexpert.metrics.vsr import VSRAccuracy

__all__ = [
    "CaptionScores",
    "POPEScores",
    "RidgeProbe",
    "SceneCaptionAccuracy",
    "SlotAccuracy",
    "TokenNLL",
    "VQAAccuracy",
    "VSRAccuracy",
    "caption_holds",
    "fit_ridge",
    "normalise_answer",
    "ridge_accuracy",
    "ridge_r2",
]
