"""Expert tokens to CLIP's token space: adapters, gate, residual."""

from visexpert.transfer.adapters import MapStem, TokenAdapter
from visexpert.transfer.gate import GateOutput, TokenGate, smooth_load
from visexpert.transfer.residual import ResidualTransfer

__all__ = ["GateOutput", "MapStem", "ResidualTransfer", "TokenAdapter", "TokenGate", "smooth_load"]
