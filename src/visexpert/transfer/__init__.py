"""From expert tokens to CLIP's token space: adapters, gate and residual; and heads that pair student and teachers."""

from visexpert.transfer.adapters import MapStem, TokenAdapter
from visexpert.transfer.gate import GateOutput, GateSettings, ResidualTransfer, TokenGate, smooth_load
from visexpert.transfer.kd_heads import AdapterKind, Alignment, KDHead, KDPair, make_kd_head, token_map
from visexpert.transfer.standardize import PhiS, Standardization, Standardize

__all__ = [
    "AdapterKind",
    "Alignment",
    "GateOutput",
    "GateSettings",
    "KDHead",
    "KDPair",
    "MapStem",
    "PhiS",
    "ResidualTransfer",
    "Standardization",
    "Standardize",
    "TokenAdapter",
    "TokenGate",
    "make_kd_head",
    "smooth_load",
    "token_map",
]
