"""Pure functions: tensors in, scalar out."""

from visexpert.losses.balance import gate_balance
from visexpert.losses.language import text_loss, token_nll

__all__ = ["gate_balance", "text_loss", "token_nll"]
