"""LightningModules: the only room where the stages meet."""

from visexpert.methods.base import Method
from visexpert.methods.merge_student import MergeStudent
from visexpert.methods.merging import Merging
from visexpert.methods.movekd import MoVEKD
from visexpert.methods.tove import ToVE

__all__ = ["MergeStudent", "Merging", "Method", "MoVEKD", "ToVE"]
