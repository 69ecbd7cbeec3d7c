"""Write, reload, compare, report: an export that is there has been proved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.export import hf, llava, onnx, open_clip, torch_export
from visexpert.export.fidelity import TOLERANCE
from visexpert.export.folder import check_target, whole_or_nothing
from visexpert.export.report import write_reports
from visexpert.export.source import LOGITS, PATCH_TOKENS, POOLED, ExportSource, Format
from visexpert.export.verify import Fidelity, verify

log = logging.getLogger(__name__)

_GRAPH = (PATCH_TOKENS, POOLED)

FORMATS: dict[str, Format] = {
    "hf": Format(hf.write, (), hf.USAGE, (POOLED,)),
    "open_clip": Format(open_clip.write, (), open_clip.USAGE, (POOLED,)),
    "onnx": Format(onnx.write, ("onnx", "onnxscript", "onnxruntime"), onnx.USAGE, _GRAPH, preprocesses=False),
    "torch_export": Format(torch_export.write, (), torch_export.USAGE, _GRAPH, preprocesses=False),
    "llava": Format(llava.write, (), llava.USAGE, (POOLED, LOGITS)),
}


def export(
    source: ExportSource, formats: Sequence[str], out: Path, *, tolerance: float = TOLERANCE
) -> dict[str, Fidelity]:
    """Export a CLIP; ``out`` appears when every format has been reloaded in a fresh process and agrees.

    Args:
        source: What to export.
        formats: Names in :data:`FORMATS`. One is written into ``out`` itself, several into folders of their names.
        out: Target, new or empty.
        tolerance: Largest error allowed over the root mean square of the reference.

    Returns:
        What the reload of each format showed.

    Raises:
        ConfigError: The target is taken, a package is missing, or the model does not fit the format.
        WeightsError: A reload failed or differs.
    """
    check_formats(formats)
    check_target(out)
    found: dict[str, Fidelity] = {}
    with whole_or_nothing(out) as partial:
        for name in formats:
            folder = partial if len(formats) == 1 else partial / name
            folder.mkdir(exist_ok=True)
            form = FORMATS[name]
            log.info("%s: writing", name)
            form.write(source, folder)
            log.info("%s: reloading in a fresh process without visexpert", name)
            found[name] = verify(source, name, form, folder, tolerance=tolerance)
            write_reports(source, name, form, found[name], folder)
    return found


def check_formats(formats: Sequence[str]) -> None:
    """Refuse unknown formats and those whose packages are missing.

    Raises:
        ConfigError: There is one.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--format {name} is unknown; use one of {', '.join(FORMATS)}.")
        missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"--format {name} needs {', '.join(missing)}; install it with: pip install 'visexpert[export]'."
            )
