"""LightningModules: the only room where the stages meet."""

from visexpert.methods.base import Method
from visexpert.methods.merging import Merging
from visexpert.methods.movekd import MoVEKD
from visexpert.methods.tove import ToVE

__all__ = ["Merging", "Method", "MoVEKD", "ToVE"]
