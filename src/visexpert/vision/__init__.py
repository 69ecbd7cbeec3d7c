"""CLIP, the encoder that knowledge goes into."""

from visexpert.vision.clip import ClipEncoder

__all__ = ["ClipEncoder"]
