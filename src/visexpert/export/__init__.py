"""Export of the merged or student CLIP to the formats of other libraries."""

from __future__ import annotations

from visexpert.export.exporter import FORMATS, KEEP_MOLE, check_formats, check_target, export, export_encoder
from visexpert.export.fidelity import TOLERANCE, differences
from visexpert.export.native import check_encoder, default_format
from visexpert.export.rounding import Dtype, check_dtype
from visexpert.export.source import ExportSource, LanguageParts, MoLEReport, Projection, TextAlignmentReport, Treatment

__all__ = [
    "FORMATS",
    "KEEP_MOLE",
    "TOLERANCE",
    "Dtype",
    "ExportSource",
    "LanguageParts",
    "MoLEReport",
    "Projection",
    "TextAlignmentReport",
    "Treatment",
    "check_dtype",
    "check_encoder",
    "check_formats",
    "check_target",
    "default_format",
    "differences",
    "export",
    "export_encoder",
]
