"""Rendering as tests do it: in this process, without progress bars."""

from __future__ import annotations

from visexpert.tabletop.datamodule import RenderSettings

QUIET = RenderSettings(workers=0, progress=False)
