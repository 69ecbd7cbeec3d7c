"""Small scenes, as the tests of the methods have them."""

from __future__ import annotations

from tests.methods.conftest import data, scenes

__all__ = ["data", "scenes"]
