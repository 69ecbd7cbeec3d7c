"""``visexpert import FOLDER --clip SOURCE --out RUN``: turn MoVE-KD's released weights into a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, WeightsError, shown

if TYPE_CHECKING:
    from visexpert.commands.released import MoLEShape, Released

EPILOG = """\
FOLDER holds mm_projector.bin, mole_encoder.bin and encoder_adapter.bin (stage 1), or a whole checkpoint (stage 2).
Stage 1 also needs --language, the model that it was trained with (Vicuna-1.5). The published ones are
jiaojuncao/MoVE-KD-7b-v1.0, -7b-v1.1, -13b-v1.0 and -13b-v1.1.

    visexpert import MoVE-KD-7b-v1.1 --clip openai/clip-vit-large-patch14-336 --out runs/move-kd-7b
    visexpert caption runs/move-kd-7b photo.jpg --prompt "What is in the picture?"

The language model of a stage-2 folder is copied to RUN/language, where config.yaml reads it from. Encoder adapters go
to RUN/start.safetensors beside student and projector: name it as init_from of a training with teachers of their names.
"""

SAM = "sam"
SAM_NOTE = (
    "sam: its adapter is left out. The released code scrambles SAM's feature map before the adapter (a token there is "
    "two channels of two rows), so the adapter does not fit SAM's real tokens; --keep_sam keeps it."
)


def run(arguments: list[str]) -> Ending:
    """Convert the files, write the run, and print what was found.

    Raises:
        ConfigError: An option is missing or contradicts the files.
        WeightsError: The files are not MoVE-KD's or do not fit together.
    """
    options = parser().parse_args(arguments)
    _check_target(options.out)
    from visexpert.commands.imported_run import write_run
    from visexpert.commands.released import mole_shape, read_released

    released = read_released(options.folder)
    shape = mole_shape(released.student)
    _check_language(released, options)
    mole, told = settle(released.config, shape, options)
    if SAM in released.adapters and not options.keep_sam:
        del released.adapters[SAM]
        told.append(SAM_NOTE)
    told += write_run(released, shape, mole, options)
    for line in told:
        print(f"- {shown(line)}")
    then = (("caption", options.out, "IMAGE"), ("export", options.out, "--format", "llava", "--out", "DIR"))
    return Ending(f"{options.out}, from {options.folder}", then)


def settle(
    config: Mapping[str, Any], shape: MoLEShape | None, options: argparse.Namespace
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the settings of MoLE from weights, ``config.json`` and options, and notes for the user.

    Args:
        config: ``config.json`` of the release, {} if it has none.
        shape: Sizes of MoLE from the weights.
        options: Options of the command line: ``alpha`` (None if not given) and ``dense``.

    Raises:
        ConfigError: An option contradicts the file.
        WeightsError: The file contradicts the weights.
    """
    told: list[str] = []
    kept = config.get("moe")
    if "kd" not in config:
        told.append("config.json has no 'kd' entry to tell whether distillation was on; nothing depends on it.")
    if shape is None:
        told.append("these files have no MoLE: the student is a plain CLIP.")
        return None, told
    if not isinstance(kept, Mapping):
        told.append(
            f"config.json has no 'moe' entry: the weights have {shape.num_experts} experts of rank {shape.rank}; alpha "
            f"{options.alpha or 1:g} and {'dense' if options.dense else 'top-1'} routing come from the options "
            "--alpha and --dense."
        )
        kept = {}
    written = {"moe_encoder_num_experts": shape.num_experts, "moe_encoder_lora_rank": shape.rank}
    for name, found in written.items():
        if kept.get(name, found) != found:
            raise WeightsError(f"config.json says {name}={kept[name]}, but the weights have {found}; fetch both again.")
    alpha = kept.get("moe_encoder_lora_alpha")
    if None not in (alpha, options.alpha) and alpha != options.alpha:
        raise ConfigError(f"--alpha {options.alpha:g} contradicts config.json, which says {alpha}; leave it out.")
    if kept.get("moe_encoder_dense") is False and options.dense:
        raise ConfigError("--dense contradicts config.json, which says moe_encoder_dense=false; leave it out.")
    mole = {
        "num_experts": shape.num_experts,
        "rank": shape.rank,
        "alpha": float(alpha or options.alpha or 1),
        "routing": "dense" if options.dense or kept.get("moe_encoder_dense") else "top1",
        "init": "released",
        "router": "released",
    }
    return mole, told


def _check_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; name a new or empty folder.")


def _check_language(released: Released, options: argparse.Namespace) -> None:
    if not released.has_language and options.language is None:
        raise ConfigError(
            f"'{options.folder}' has no language model; name the one that it was trained with by --language, such as "
            "lmsys/vicuna-7b-v1.5."
        )
    if released.has_language and options.language is not None:
        raise ConfigError(f"'{options.folder}' has a language model of its own; leave --language out.")


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert import",
        description="Turn MoVE-KD's released weights into a run that captions and trains on.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of released files")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="new folder of the run")
    parser.add_argument(
        "--clip",
        required=True,
        metavar="SOURCE",
        help="the CLIP that was trained: folder or Hugging Face id (gives sizes, and the frozen teacher)",
    )
    parser.add_argument("--language", metavar="SOURCE", help="language model of stage 1: folder or Hugging Face id")
    parser.add_argument("--alpha", type=float, help="MoLE's, if config.json does not give it (default: 1)")
    parser.add_argument("--dense", action="store_true", help="MoLE routes densely, if config.json does not tell")
    parser.add_argument(
        "--chat",
        default="vicuna_v1",
        metavar="STYLE",
        help="chat template of the training: vicuna_v1, llama_2, mistral, plain (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="data type of the language model: float32, bfloat16, float16 (default: %(default)s)",
    )
    parser.add_argument(
        "--data", default="data/llava", metavar="DIR", help="LLaVA's data for further training (default: %(default)s)"
    )
    parser.add_argument("--keep_sam", action="store_true", help="keep SAM's adapter, which does not fit SAM's tokens")
    return parser
