"""Small pretrained models that ship with the package, and their training code."""

from __future__ import annotations
