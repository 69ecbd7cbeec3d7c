"""The merged or student CLIP in other libraries' formats."""

from __future__ import annotations
