"""Keep, fold or flatten the MoLE of a student for ``visexpert export``, as each format requires."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L

from visexpert.commands.export_images import Part, PartImages, run_on_images, with_images
from visexpert.commands.export_source import source_of
from visexpert.errors import ConfigError, DataError, UserError
from visexpert.export import KEEP_MOLE, ExportSource, MoLEReport, Treatment, differences
from visexpert.export.flattening import Flattening, RouterUse
from visexpert.runs import SavedRun
from visexpert.vision import RouterUsage, VisionEncoder, fold, mole_settings

log = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = ("validation", "training")

BATCHES = 8
"""Number of batches for measuring the use of experts and the errors."""


def sources_of(
    saved: SavedRun,
    formats: Sequence[str],
    *,
    layers: Sequence[int] | None,
    treatment: Treatment | None,
    flatten: tuple[int, float],
    images: Path | None = None,
) -> dict[str, ExportSource]:
    """Return what to export of a run, by format.

    Args:
        saved: The run; its encoder is replaced when it is folded or flattened.
        formats: Names of formats.
        layers: Hidden states to compare; None for the layer that the run reads, and the last.
        treatment: What to do with MoLE; None keeps it where the format can, else folds it.
        flatten: Steps and peak learning rate of a flattening.
        images: Folder or configuration with images for folding and flattening; None for the run's own.

    Raises:
        ConfigError: The run or a format does not allow the treatment.
        DataError: The treatment needs the run's images, and they cannot be read.
    """
    model = saved.model
    settings = mole_settings(model.clip)
    if settings is None and treatment is not None:
        raise ConfigError(f"--mole {treatment}: the encoder of '{saved.folder}' has no MoLE; leave --mole out.")
    if settings is None and images is not None:
        raise ConfigError(f"--data {images}: the encoder of '{saved.folder}' has no MoLE to fold; leave --data out.")
    source = source_of(saved, layers, with_language="llava" in formats)
    if settings is None:
        return dict.fromkeys(formats, source)
    chosen = {name: _treatment_of(name, treatment) for name in formats}
    student = replace(source, language=None, mole=MoLEReport("exact", settings))
    sources = {name: student for name, how in chosen.items() if how == "exact"}
    others = [name for name in formats if name not in sources]
    if others:
        clip, report = _plain(with_images(saved, images), student, chosen[others[0]], flatten, named=images is not None)
        model.clip = clip  # the export's language model is compared with this one
        sources |= dict.fromkeys(others, replace(source, clip=clip, mole=report))
    return {name: sources[name] for name in formats}


def _treatment_of(name: str, wanted: Treatment | None) -> Treatment:
    """Return what a format does with MoLE.

    Raises:
        ConfigError: The format cannot do what was asked for.
    """
    if wanted == "exact" and name not in KEEP_MOLE:
        raise ConfigError(
            f"--mole exact: {name} cannot hold MoLE; use --mole fold or flatten, or --format {', '.join(KEEP_MOLE)}."
        )
    if wanted in ("fold", "flatten") and name == "visexpert":
        raise ConfigError(
            f"--mole {wanted} makes a plain encoder; use --format hf or native for it, which visexpert also reads."
        )
    if wanted is None and name not in KEEP_MOLE:
        log.warning(
            "%s cannot hold MoLE: its experts are folded into a plain encoder (--mole fold); %s keep them.",
            name,
            ", ".join(KEEP_MOLE),
        )
        return "fold"
    return "exact" if wanted is None else wanted


def _plain(
    saved: SavedRun, student: ExportSource, treatment: Treatment, flatten: tuple[int, float], *, named: bool
) -> tuple[VisionEncoder, MoLEReport]:
    """Make one plain encoder of the student, and measure its error."""
    assert student.mole is not None
    settings = student.mole.settings
    usage, part = _usage(saved, student.clip)
    plain = fold(student.clip, usage)
    steps, lr = flatten
    work = Flattening(student=student.clip, plain=plain, lr=lr, warmup_steps=max(1, steps // 10))
    on_val = {"fold": _error(saved, work, part)}
    if treatment == "flatten":
        _run(saved, work, "Flattening", steps=steps)
        on_val["flatten"] = _error(saved, work, part)
    plain.requires_grad_(False).eval()
    on_checks = differences(student.clip, plain, student.layers)
    report = MoLEReport(
        treatment,
        settings,
        usage,
        on_checks,
        on_val,
        steps if treatment == "flatten" else 0,
        images="named" if named else part,
    )
    return plain, report


def _usage(saved: SavedRun, student: VisionEncoder) -> tuple[RouterUsage, Part]:
    """Measure the use of experts on the validation images, or on the training images if the data has no others."""
    for part in PARTS:
        use = RouterUse(student)
        _run(saved, use, "Measuring the use of experts", part=part)
        if use.meter.num_images:
            if part != "validation":
                log.warning("The data has no validation images, so training images are used (--data names others).")
            return use.meter.usage(), part
    raise DataError(f"'{saved.folder}' has no images for folding; name some with --data FOLDER.")


def _error(saved: SavedRun, work: Flattening, part: Part) -> dict[str, float]:
    _run(saved, work, "Measuring the plain encoder", part=part)
    return work.error.compute()


def _run(saved: SavedRun, module: L.LightningModule, what: str, *, steps: int = 0, part: Part = "validation") -> None:
    """Train for ``steps`` steps, or validate if 0, see :func:`~visexpert.commands.export_images.run_on_images`.

    Raises:
        DataError: The run's images cannot be read.
    """
    log.info("%s, on the run's images", what)
    try:
        data = saved.data if steps else PartImages(saved.data, part)
        run_on_images(saved, module, data, steps=steps, batches=BATCHES)
    except UserError as error:
        raise DataError(
            f"--mole fold and flatten need the run's own images, which cannot be read ({error}); restore them, "
            f"name others with --data FOLDER, or use --mole exact with --format {', '.join(KEEP_MOLE)}."
        ) from error
