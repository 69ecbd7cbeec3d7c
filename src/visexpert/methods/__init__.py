"""The methods, as LightningModules."""

from visexpert.methods.base import Method
from visexpert.methods.fusing import FusingMethod
from visexpert.methods.movekd.method import MoVEKD
from visexpert.methods.parts import ROLES, Part, StoredTokens
from visexpert.methods.settings import (
    AgglomerationSettings,
    AuxiliarySettings,
    EvaluationSettings,
    HeadSettings,
    MergeSettings,
    MergingOptimizer,
    MoVEKDOptimizer,
    OptimizerSettings,
    StoreSettings,
    ToVEOptimizer,
    WeightingSettings,
)
from visexpert.methods.tove.merging import MergeStudent, Merging
from visexpert.methods.tove.method import ToVE

__all__ = [
    "ROLES",
    "AgglomerationSettings",
    "AuxiliarySettings",
    "EvaluationSettings",
    "FusingMethod",
    "HeadSettings",
    "MergeSettings",
    "MergeStudent",
    "Merging",
    "MergingOptimizer",
    "Method",
    "MoVEKD",
    "MoVEKDOptimizer",
    "OptimizerSettings",
    "Part",
    "StoreSettings",
    "StoredTokens",
    "ToVE",
    "ToVEOptimizer",
    "WeightingSettings",
]
