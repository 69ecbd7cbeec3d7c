"""Turn several frozen vision experts into one better vision encoder."""

__version__ = "0.2.0.dev0"
