"""Callbacks: what a run shows while it trains, and what it writes into its folder."""

from __future__ import annotations

from visexpert.callbacks.alignment import TextAlignment
from visexpert.callbacks.checkpoint_io import ShipLanguage
from visexpert.callbacks.cost import CostReport, TrainingBudget
from visexpert.callbacks.detach import ExpertDetachment
from visexpert.callbacks.figures import RunFigures
from visexpert.callbacks.meant_for import MeantFor
from visexpert.callbacks.merge import KnowledgeMerging
from visexpert.callbacks.neighbors import NearestNeighbors
from visexpert.callbacks.phase import Phase, PhaseSettings
from visexpert.callbacks.predictions import Predictions
from visexpert.callbacks.progress import ThroughputMonitor, TrainingProgress
from visexpert.callbacks.run_folder import RunFolder, RunLogger, SaveRunConfig
from visexpert.callbacks.stop import MetricsContinuation, StopOnSignal

__all__ = [
    "CostReport",
    "ExpertDetachment",
    "KnowledgeMerging",
    "MeantFor",
    "MetricsContinuation",
    "NearestNeighbors",
    "Phase",
    "PhaseSettings",
    "Predictions",
    "RunFigures",
    "RunFolder",
    "RunLogger",
    "SaveRunConfig",
    "ShipLanguage",
    "StopOnSignal",
    "TextAlignment",
    "ThroughputMonitor",
    "TrainingBudget",
    "TrainingProgress",
]
