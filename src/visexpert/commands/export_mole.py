"""``visexpert export`` of a student with MoLE: kept, folded or flattened, format by format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import lightning as L

from visexpert.callbacks import TrainingProgress
from visexpert.callbacks.phase import saved_settings
from visexpert.commands.export_images import Part, PartImages, with_images
from visexpert.commands.export_source import source_of
from visexpert.errors import ConfigError, DataError, UserError
from visexpert.export import KEEP_MOLE, ExportSource, MoLEReport, Treatment, differences
from visexpert.export.flattening import Flattening, RouterUse
from visexpert.runs import SavedRun
from visexpert.vision import ClipEncoder, RouterUsage, fold, mole_settings

log = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = ("validation", "training")

BATCHES = 8
"""Batches of images that the use of experts and the errors are measured on."""


def sources_of(
    saved: SavedRun,
    formats: Sequence[str],
    *,
    layers: Sequence[int] | None,
    treatment: Treatment | None,
    flatten: tuple[int, float],
    images: Path | None = None,
) -> dict[str, ExportSource]:
    """What an opened run has to export, by format.

    Args:
        saved: The run; its CLIP is exchanged where it is folded or flattened.
        formats: Names of formats.
        layers: Hidden states to compare; None for the one that is read and the last.
        treatment: What to do with MoLE; None keeps it where the format can, else folds it.
        flatten: Steps and peak learning rate of a flattening.
        images: A folder or configuration that names other images than the run's own, for folding and flattening.

    Raises:
        ConfigError: A treatment that the run or a format has no use for.
        DataError: The run's images are not at hand, and the treatment needs them.
    """
    model = saved.model
    settings = mole_settings(model.clip)
    if settings is None and treatment is not None:
        raise ConfigError(f"--mole {treatment}: the CLIP of '{saved.folder}' has no MoLE; leave --mole out.")
    if settings is None and images is not None:
        raise ConfigError(f"--data {images}: the CLIP of '{saved.folder}' has no MoLE to fold; leave --data out.")
    source = source_of(saved, layers, with_language="llava" in formats)
    if settings is None:
        return dict.fromkeys(formats, source)
    chosen = {name: _treatment_of(name, treatment) for name in formats}
    student = replace(source, language=None, mole=MoLEReport("exact", settings))
    sources = {name: student for name, how in chosen.items() if how == "exact"}
    others = [name for name in formats if name not in sources]
    if others:
        clip, report = _plain(with_images(saved, images), student, chosen[others[0]], flatten, named=images is not None)
        model.clip = clip  # what the language model of the export is compared with
        sources |= dict.fromkeys(others, replace(source, clip=clip, mole=report))
    return {name: sources[name] for name in formats}


def _treatment_of(name: str, wanted: Treatment | None) -> Treatment:
    """What a format does with MoLE.

    Raises:
        ConfigError: It cannot do what is wanted.
    """
    if wanted == "exact" and name not in KEEP_MOLE:
        raise ConfigError(
            f"--mole exact: {name} has no place for MoLE; take --mole fold or flatten, or --format "
            f"{', '.join(KEEP_MOLE)}."
        )
    if wanted in ("fold", "flatten") and name == "visexpert":
        raise ConfigError(f"--mole {wanted} gives a plain CLIP, which --format hf is for: visexpert reads that, too.")
    if wanted is None and name not in KEEP_MOLE:
        log.warning(
            "%s has no place for MoLE: its experts are folded into a plain CLIP (--mole fold); %s keep them.",
            name,
            ", ".join(KEEP_MOLE),
        )
        return "fold"
    return "exact" if wanted is None else wanted


def _plain(
    saved: SavedRun, student: ExportSource, treatment: Treatment, flatten: tuple[int, float], *, named: bool
) -> tuple[ClipEncoder, MoLEReport]:
    """One plain CLIP, and how far it is from the student."""
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


def _usage(saved: SavedRun, student: ClipEncoder) -> tuple[RouterUsage, Part]:
    """The use of experts on validation images; on training images where the data has no others."""
    for part in PARTS:
        use = RouterUse(student)
        _run(saved, use, "Measuring the use of experts", part=part)
        if use.meter.num_images:
            if part != "validation":
                log.warning("The data has no validation images; training images are folded by (--data names others).")
            return use.meter.usage(), part
    raise DataError(f"'{saved.folder}' has no images to fold by; name some with --data FOLDER.")


def _error(saved: SavedRun, work: Flattening, part: Part) -> dict[str, float]:
    _run(saved, work, "Measuring the plain CLIP", part=part)
    return work.error.compute()


def _run(saved: SavedRun, module: L.LightningModule, what: str, *, steps: int = 0, part: Part = "validation") -> None:
    """Train for so many steps, or validate; on one device of the run's kind, weights in float32.

    Raises:
        DataError: The run's images are not at hand.
    """
    settings = saved_settings(saved.folder)
    precision: Any = settings.precision if str(settings.precision).endswith("mixed") else "32-true"
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=precision,
        max_steps=max(steps, 1),
        limit_val_batches=0 if steps else BATCHES,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=gettempdir(),
        callbacks=[TrainingProgress()],
    )
    log.info("%s, on the run's images", what)
    try:
        if steps:
            trainer.fit(module, datamodule=saved.data)
        else:
            trainer.validate(module, datamodule=PartImages(saved.data, part), verbose=False)
    except UserError as error:
        raise DataError(
            f"--mole fold and flatten need the run's own images, which could not be had ({error}); bring them back, "
            f"name others with --data FOLDER, or take --mole exact with --format {', '.join(KEEP_MOLE)}."
        ) from error
