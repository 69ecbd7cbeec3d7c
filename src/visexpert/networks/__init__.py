"""Models of transformers and timm: described and built without weights, then loaded; for experts and encoders."""

RANDOM = "random"
"""Weights that are random, where a name of weights is asked for."""
