"""Small pretrained models that ship with the package, and what trained them."""

from __future__ import annotations
