"""The merged or student CLIP in other libraries' formats."""

from __future__ import annotations

from visexpert.export.exporter import FORMATS, check_formats, export
from visexpert.export.fidelity import TOLERANCE
from visexpert.export.folder import check_target
from visexpert.export.source import ExportSource, LanguageParts

__all__ = ["FORMATS", "TOLERANCE", "ExportSource", "LanguageParts", "check_formats", "check_target", "export"]
