"""Write an export, reload it, compare it, report: an export that exists has been verified."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from visexpert.errors import ConfigError, DataError
from visexpert.export import clip_folders, graphs, llava, native
from visexpert.export.fidelity import TOLERANCE
from visexpert.export.report import write_reports
from visexpert.export.rounding import check_dtype, name_of
from visexpert.export.source import LOGITS, PATCH_TOKENS, POOLED, ExportSource, Format, MoLEReport
from visexpert.export.verify import Fidelity, verify
from visexpert.io.files import whole_folder
from visexpert.typed import typed
from visexpert.vision import VisionEncoder, equipped_blocks, mole_settings
from visexpert.vision.saving import TRANSFORMERS_USAGE
from visexpert.vision.saving_open_clip import OPEN_CLIP_USAGE

log = logging.getLogger(__name__)

_GRAPH = (PATCH_TOKENS, POOLED)

FORMATS: dict[str, Format] = {
    "native": Format(native.write_native, (), None, (POOLED,)),
    "hf": Format(clip_folders.write_hf, (), TRANSFORMERS_USAGE, (POOLED,)),
    "open_clip": Format(clip_folders.write_open_clip, (), OPEN_CLIP_USAGE, (POOLED,)),
    "onnx": Format(
        graphs.write_onnx, ("onnx", "onnxscript", "onnxruntime"), graphs.ONNX_USAGE, _GRAPH, False, "merged"
    ),
    "torch_export": Format(graphs.write_torch_export, (), graphs.TORCH_EXPORT_USAGE, _GRAPH, False, "merged"),
    "llava": Format(llava.write_llava, (), llava.LLAVA_USAGE, (POOLED, LOGITS)),
    "visexpert": Format(clip_folders.write_visexpert, (), clip_folders.VISEXPERT_USAGE, (POOLED,), mole="trained"),
}
KEEP_MOLE = tuple(name for name, form in FORMATS.items() if form.mole is not None)
"""Formats that can hold a student's mixture of low-rank experts."""


def export(sources: Mapping[str, ExportSource], out: Path, *, tolerance: float = TOLERANCE) -> dict[str, Fidelity]:
    """Export an encoder; ``out`` appears only after every format has been reloaded in a fresh process and agrees.

    Args:
        sources: What to export, by format (a name in :data:`FORMATS`). A single format is written into ``out`` itself,
            several into folders named after them.
        out: Target folder, new or empty.
        tolerance: Largest allowed error, relative to the root mean square of the reference.

    Returns:
        Result of the reload, by format.

    Raises:
        ConfigError: The target is not empty, a package is missing, or the model does not fit the format.
        WeightsError: A reload fails or differs.
    """
    check_formats(sources)
    for name, source in sources.items():
        check_dtype([name], None if source.dtype is None else name_of(source.dtype))  # type: ignore[arg-type]
    check_target(out)
    for name, source in sources.items():
        native.check_encoder(source.clip, name)
        if equipped_blocks(source.clip) and FORMATS[name].mole is None:
            raise ConfigError(
                f"The format {name} cannot hold MoLE; export a plain CLIP (`visexpert export --mole fold` makes "
                f"one, or flatten), or use one of {', '.join(KEEP_MOLE)}."
            )
    found: dict[str, Fidelity] = {}
    with whole_or_nothing(out) as partial:
        for name, source in sources.items():
            folder = partial if len(sources) == 1 else partial / name
            folder.mkdir(exist_ok=True)
            form = FORMATS[name]
            log.info("%s: writing", name)
            form.write(source, folder)
            log.info("%s: reloading in a fresh process", name)
            found[name] = verify(source, name, form, folder, tolerance=tolerance)
            write_reports(source, name, form, found[name], folder)
    return found


@typed
def export_encoder(
    clip: VisionEncoder,
    out: str | Path,
    *,
    format: str | None = None,
    layers: Sequence[int] | None = None,
    licenses: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
) -> Fidelity:
    """Write an encoder in another library's format; ``out`` appears when a fresh process has reloaded it and agrees.

    Args:
        clip: The encoder, weights in place.
        out: Target, new or empty.
        format: ``native`` (what the encoder's own library writes), ``hf``, ``open_clip``, ``onnx``, ``torch_export``
            or ``visexpert``; the last three keep MoLE. None for ``hf`` with a ClipEncoder, else ``native``.
        layers: Hidden states to compare, -1 the last; None for the one that is read and the last.
        licenses: License of each part whose knowledge went into it, such as ``model.licenses()``; None for the
            encoder's own.
        tolerance: Largest error allowed over the root mean square of the reference.

    Returns:
        What the reload showed.

    Raises:
        ConfigError: The format is unknown, the target is taken, or a package is missing.
        WeightsError: The reload failed or differs; nothing is left behind.
    """
    format = format or native.default_format(clip)
    found = copy.deepcopy(clip).cpu().eval().requires_grad_(False)
    hidden = tuple(dict.fromkeys((clip.layer, -1) if layers is None else layers))
    settings = mole_settings(found)
    source = ExportSource(
        found,
        hidden,
        pooled_trained=None,
        licenses={"clip": clip.license} if licenses is None else licenses,
        mole=None if settings is None else MoLEReport("exact", settings),
    )
    return export({format: source}, Path(out), tolerance=tolerance)[format]


def check_formats(formats: Iterable[str]) -> None:
    """Check that formats are known and their packages installed.

    Raises:
        ConfigError: A format is unknown, or a package is missing.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"format {name!r} is unknown; use one of {', '.join(FORMATS)}.")
        missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"format {name!r} needs {', '.join(missing)}; install it with: pip install 'visexpert[export]'."
            )


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Provide a hidden folder beside ``out`` that is renamed to ``out`` at the end, or removed after an error.

    A killed process leaves at most the hidden folder, ``.NAME.HOST-NUMBER.part``.

    Args:
        out: Target; may exist only as an empty folder.

    Raises:
        ConfigError: The target is a file or is not empty.
        DataError: The folder cannot be written.
    """
    check_target(out)
    try:
        with whole_folder(out) as partial:
            yield partial
    except OSError as error:
        raise DataError(f"'{out}' cannot be written ({error}); choose a writable folder with enough space.") from error


def check_target(out: Path) -> None:
    """Check that a target is new or an empty folder.

    Raises:
        ConfigError: The target is a file or is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"The folder '{out}' is not empty; name a new or an empty one.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; name a new or an empty folder.")
