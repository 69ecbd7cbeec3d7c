"""Expert tokens to CLIP's token space: adapters, gate, residual; and heads where student and teachers meet."""

from visexpert.transfer.adapters import MapStem, TokenAdapter
from visexpert.transfer.encoder_adapters import AdapterKind, Alignment, KDHead, KDPair, make_kd_head
from visexpert.transfer.gate import GateOutput, GateSettings, TokenGate, smooth_load
from visexpert.transfer.residual import ResidualTransfer

__all__ = [
    "AdapterKind",
    "Alignment",
    "GateOutput",
    "GateSettings",
    "KDHead",
    "KDPair",
    "MapStem",
    "ResidualTransfer",
    "TokenAdapter",
    "TokenGate",
    "make_kd_head",
    "smooth_load",
]
