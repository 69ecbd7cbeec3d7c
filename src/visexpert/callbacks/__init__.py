"""Callbacks: what a run shows while it goes on, and what it leaves in its folder."""

from __future__ import annotations

from visexpert.callbacks.budget import TrainingBudget
from visexpert.callbacks.continuation import MetricsContinuation
from visexpert.callbacks.cost import CostReport
from visexpert.callbacks.detach import ExpertDetachment
from visexpert.callbacks.figures import RunFigures
from visexpert.callbacks.meant_for import MeantFor
from visexpert.callbacks.merge import KnowledgeMerging
from visexpert.callbacks.phase import Phase, PhaseSettings
from visexpert.callbacks.predictions import Predictions
from visexpert.callbacks.progress import TrainingProgress
from visexpert.callbacks.run_folder import RunFolder, SaveRunConfig
from visexpert.callbacks.run_logger import RunLogger
from visexpert.callbacks.ship_language import ShipLanguage
from visexpert.callbacks.stop import StopOnSignal
from visexpert.callbacks.throughput import ThroughputMonitor

__all__ = [
    "CostReport",
    "ExpertDetachment",
    "KnowledgeMerging",
    "MeantFor",
    "MetricsContinuation",
    "Phase",
    "PhaseSettings",
    "Predictions",
    "RunFigures",
    "RunFolder",
    "RunLogger",
    "SaveRunConfig",
    "ShipLanguage",
    "StopOnSignal",
    "ThroughputMonitor",
    "TrainingBudget",
    "TrainingProgress",
]
