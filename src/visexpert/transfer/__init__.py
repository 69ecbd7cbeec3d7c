"""Expert tokens to CLIP's token space: adapters, gate, residual; and heads where student and teachers meet."""

from visexpert.transfer.adapters import MapStem, TokenAdapter
from visexpert.transfer.encoder_adapters import AdapterKind, Direction, KDHead, KDPair, make_kd_head
from visexpert.transfer.gate import GateOutput, TokenGate, smooth_load
from visexpert.transfer.residual import ResidualTransfer

__all__ = [
    "AdapterKind",
    "Direction",
    "GateOutput",
    "KDHead",
    "KDPair",
    "MapStem",
    "ResidualTransfer",
    "TokenAdapter",
    "TokenGate",
    "make_kd_head",
    "smooth_load",
]
