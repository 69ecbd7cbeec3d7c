"""``visexpert export RUN --format NAME --out DIR``: a run's encoder for its own library, ONNX, torch or others."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, shown

if TYPE_CHECKING:
    from visexpert.runs import SavedRun

log = logging.getLogger(__name__)

NAMES = ("native", "hf", "open_clip", "onnx", "torch_export", "llava", "visexpert")
"""Names of the formats, kept here so that --help does not import them."""

DTYPES = ("float32", "bfloat16", "float16")
MERGED = "merged"
MOLE = ("exact", "fold", "flatten")
STEPS, RATE = 300, 1e-4
"""Defaults of ``--mole flatten``: on a student from Tabletop, rates from 1e-4 to 1e-3 all reduced the NMSE, from .0028
(fold) to .0011-.0013."""


def run(arguments: list[str]) -> Ending:
    """Export a run, and print how close each export is to it.

    Raises:
        ConfigError: The run, the target folder or a setting is not valid.
        WeightsError: An export differs after reloading; it is removed.
    """
    options = parser().parse_args(arguments)
    from visexpert.export import (
        check_dtype,
        check_encoder,
        check_formats,
        check_target,
        default_format,
        export,
    )  # heavy

    formats = list(dict.fromkeys(name.strip() for entry in options.format or () for name in entry.split(",")))
    check_formats(formats)
    check_dtype(formats, options.dtype)
    check_target(options.out)
    if options.alignment_images < 0:
        raise ConfigError(f"--alignment_images {options.alignment_images} must be 0 or more.")
    if not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance} must be above 0.")
    flatten = _flatten_settings(options)
    folder = run_with_clip(options.run)
    log.info("Opening %s", folder)
    import torch

    from visexpert.commands.export_alignment import with_alignment
    from visexpert.commands.export_mole import sources_of
    from visexpert.runs import load_run

    saved = load_run(folder)
    check_clip(saved)
    formats = formats or [default_format(saved.model.clip)]
    for name in formats:
        check_encoder(saved.model.clip, name)
    sources = sources_of(
        saved, formats, layers=options.layers, treatment=options.mole, flatten=flatten, images=options.data
    )
    sources = with_alignment(saved, sources, images=options.alignment_images)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    sources = {name: replace(source, dtype=dtype) for name, source in sources.items()}
    found = export(sources, options.out, tolerance=options.tolerance)
    for name, fidelity in found.items():
        where = options.out if len(found) == 1 else options.out / name
        worst = max(entry["relative"] for entry in fidelity.outputs.values())
        print(f"{name}: {shown(where)} (largest error after reloading {worst:.1e} of the outputs' root mean square)")
        mole = sources[name].mole
        if mole is not None and mole.on_val is not None:
            nmse = mole.on_val[mole.treatment]["nmse"]
            print(f"{name}: one plain encoder ({mole.treatment}), NMSE {nmse:.1e} from the student, see fidelity.md")
        print(f"{name}: {shown(where / 'README.md')} shows how to load it, fidelity.md beside it how faithful it is")
    return Ending(
        f"{options.out} ({', '.join(found)})", _then(folder, options.out, list(found), saved.model.clip.layer)
    )


def _then(run: Path, out: Path, formats: list[str], layer: int) -> tuple[tuple[object, ...], ...]:
    """Return what can be done with an export: train on it where it is a source of weights, else look at the run."""
    for name in ("hf", "native"):
        if name in formats:
            return (("try", out if len(formats) == 1 else out / name, "--as", "encoder", "--layer", layer),)
    return (("test", run),)


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert export",
        description="Write a run's trained encoder in its own or another library's format. Each export is loaded "
        "again in a fresh process that cannot import visexpert, and compared; an export that differs is removed.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run that `visexpert merge` has merged, its merged folder, or any run that trained its encoder",
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="NAME",
        help=f"{', '.join(NAMES)}; several separated by commas, each then in a folder of its name inside DIR; native "
        "is what the encoder's own library writes, its text tower and head kept (default: hf for a ClipEncoder, else "
        "native)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="hidden states to return and compare, -1 for the last (default: the layer that the run reads, and -1)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest error allowed, relative to the root mean square of the output (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="data type to store all weights in (native, hf, open_clip, llava); fidelity.md reports the rounding error "
        "(default: float32; a language model keeps the run's)",
    )
    parser.add_argument(
        "--alignment_images",
        type=int,
        default=1000,
        metavar="N",
        help="validation images of the run on which retrieval and zero-shot classification through the source's text "
        "tower are measured, before training and now; 0 for none (default: %(default)s)",
    )
    _add_mole_arguments(parser)
    return parser


def _add_mole_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--mole",
        choices=MOLE,
        help="for a student with MoLE: exact keeps its low-rank experts (onnx, torch_export, visexpert), fold averages "
        "them into one plain encoder, weighted by their use on the run's validation images, flatten also trains it to "
        "reproduce the student's tokens; fidelity.md reports the error (default: exact where possible, else fold)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER|YAML",
        help="images to fold and flatten on: a folder, or a configuration with `data` (default: the run's validation "
        "images, or its training images if it has no others)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps of --mole flatten (default: {STEPS})")
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help=f"peak learning rate of --mole flatten (default: {RATE:g})",
    )


def _flatten_settings(options: argparse.Namespace) -> tuple[int, float]:
    """Return steps and learning rate of the flattening.

    Raises:
        ConfigError: One of them is not above 0, or was given without ``--mole flatten``.
    """
    for name in ("steps", "lr"):
        value = getattr(options, name)
        if value is not None and options.mole != "flatten":
            raise ConfigError(f"--{name} {value} needs --mole flatten; add it, or leave --{name} out.")
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value} must be above 0.")
    return options.steps or STEPS, options.lr or RATE


def run_with_clip(folder: Path) -> Path:
    """Return the folder to open: RUN/merged if it exists, else RUN.

    Raises:
        ConfigError: The folder is not a run, or its merge is not finished.
    """
    from visexpert.run_arguments import config_of

    config_of(folder)
    merged = folder / MERGED
    if merged.is_dir():
        if not (merged / "checkpoints" / "last.ckpt").is_file() or not (merged / "config.yaml").is_file():
            raise ConfigError(f"'{merged}' is not finished; run `visexpert merge {folder}` again to resume it.")
        return merged
    return folder


def check_clip(saved: SavedRun) -> None:
    """Check that the run has trained its encoder; warn if it stayed frozen in a method that does not merge.

    Raises:
        ConfigError: The run fuses experts, and has not been merged.
    """
    from visexpert.methods import FusingMethod

    folder = saved.folder
    if saved.model.holds("clip"):
        return
    if isinstance(saved.model, FusingMethod):
        raise ConfigError(
            f"'{folder}' has no merged encoder, and its own stayed frozen; run `visexpert merge {folder}` first."
        )
    log.warning("The encoder of %s stayed frozen: its weights are those the run started with.", folder)
