"""``visexpert export RUN --format NAME --out DIR``: a run's CLIP for transformers, open_clip, ONNX, torch or LLaVA."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, shown

if TYPE_CHECKING:
    from visexpert.runs import SavedRun

log = logging.getLogger(__name__)

NAMES = ("hf", "open_clip", "onnx", "torch_export", "llava", "visexpert")
"""Formats, said here so that --help need not import them."""

DTYPES = ("float32", "bfloat16", "float16")
MERGED = "merged"
MOLE = ("exact", "fold", "flatten")
STEPS, RATE = 300, 1e-4
"""Defaults of ``--mole flatten``: on a student from Tabletop, rates of 1e-4 to 1e-3 brought the NMSE from .0028 (fold)
to .0011-.0013 alike."""


def run(arguments: list[str]) -> None:
    """Export, and say how faithful each export is.

    Raises:
        ConfigError: The run, the target or a setting cannot be used.
        WeightsError: An export differs after reloading; nothing is left behind.
    """
    options = parser().parse_args(arguments)
    from visexpert.export import check_dtype, check_formats, check_target, export  # heavy: after --help

    formats = list(dict.fromkeys(name.strip() for entry in options.format for name in entry.split(",")))
    check_formats(formats)
    check_dtype(formats, options.dtype)
    check_target(options.out)
    if not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance} must be above 0.")
    flatten = _flatten_settings(options)
    folder = run_with_clip(options.run)
    log.info("Opening %s", folder)
    import torch

    from visexpert.commands.export_mole import sources_of
    from visexpert.runs import load_run

    saved = load_run(folder)
    check_clip(saved)
    sources = sources_of(
        saved, formats, layers=options.layers, treatment=options.mole, flatten=flatten, images=options.data
    )
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
            print(f"{name}: one plain CLIP ({mole.treatment}), NMSE {nmse:.1e} from the student, see fidelity.md")
        print(f"{name}: {shown(where / 'README.md')} shows how to load it, fidelity.md beside it how faithful it is")


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert export",
        description="Write a run's trained CLIP in another library's format. Each export is loaded again in a fresh "
        "process that cannot import visexpert, and compared; one that differs leaves nothing behind.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run that `visexpert merge` has merged, its merged folder, or any run that trained CLIP",
    )
    parser.add_argument(
        "--format",
        action="append",
        required=True,
        metavar="NAME",
        help=f"{', '.join(NAMES)}; several separated by commas, each then in a folder of its name inside DIR",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="hidden states to hand out and compare, -1 for the last (default: the layer that the run reads, and -1)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest error allowed, over the root mean square of the output (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="round all weights and store them so (hf, open_clip, llava); fidelity.md says what that changes (default: "
        "float32, but a language model as the run has it)",
    )
    parser.add_argument(
        "--mole",
        choices=MOLE,
        help="for a student with MoLE: exact keeps its low-rank experts (onnx, torch_export, visexpert), fold averages "
        "them by their use on the run's validation images into one plain CLIP, flatten also trains that CLIP to give "
        "the student's tokens; fidelity.md says what either loses (default: exact where the format can, else fold)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER|YAML",
        help="images to fold and flatten on: a folder, or a configuration with `data` (default: the run's validation "
        "images, or its training images where it has no others)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps of --mole flatten (default: {STEPS})")
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help=f"peak learning rate of --mole flatten (default: {RATE:g})",
    )
    return parser


def _flatten_settings(options: argparse.Namespace) -> tuple[int, float]:
    """Steps and rate.

    Raises:
        ConfigError: One is out of range, or nothing is flattened.
    """
    for name in ("steps", "lr"):
        value = getattr(options, name)
        if value is not None and options.mole != "flatten":
            raise ConfigError(f"--{name} {value} is for --mole flatten; add that, or leave --{name} out.")
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value} must be above 0.")
    return options.steps or STEPS, options.lr or RATE


def run_with_clip(folder: Path) -> Path:
    """The folder to open: RUN/merged where it is, else RUN.

    Raises:
        ConfigError: The folder is not a run, or its merge is not finished.
    """
    from visexpert.training import config_of

    config_of(folder)
    merged = folder / MERGED
    if merged.is_dir():
        if not (merged / "checkpoints" / "last.ckpt").is_file() or not (merged / "config.yaml").is_file():
            raise ConfigError(
                f"'{merged}' is not finished; run `visexpert merge {folder}` again, which goes on from there."
            )
        return merged
    return folder


def check_clip(saved: SavedRun) -> None:
    """Refuse a run whose CLIP is yet to be merged; say of any other frozen CLIP that the run has not changed it.

    Raises:
        ConfigError: See above.
    """
    from visexpert.methods import FusingMethod

    folder = saved.folder
    if saved.model.holds("clip"):
        return
    if isinstance(saved.model, FusingMethod):
        raise ConfigError(
            f"'{folder}' has no merged CLIP, and its own CLIP stayed frozen; run `visexpert merge {folder}` first."
        )
    log.warning("The CLIP of %s stayed frozen: its weights are those that the run began with.", folder)
