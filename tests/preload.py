"""What every process of :mod:`tests.two_processes` needs, imported before they are forked."""

import lightning
import torch

import visexpert.callbacks
import visexpert.data
import visexpert.methods

__all__ = ["lightning", "torch", "visexpert"]
