"""``visexpert try MODEL``: whether a model can be an expert, the encoder to train, or the language model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, shown

if TYPE_CHECKING:
    from visexpert.commands.trial import Attempt

NOTHING_WORKS = 2

EPILOG = """\
MODEL is what a configuration takes:
  FOLDER                     written by transformers (save_pretrained), open_clip or timm
  ORG/NAME, hf:ORG/NAME@REV  a repository on the Hugging Face Hub
  NAME.TAG                   a model of timm, such as vit_large_patch14_dinov2.lvd142m
  open_clip:NAME/TAG         a model of open_clip, such as open_clip:ViT-L-14-336/openai
  zoo:NAME                   a model that is shipped with the package
For a file of weights give the name of its network, and the file as --weights; `--weights random` needs no weights.

examples:
  visexpert try facebook/dinov2-large
  visexpert try facebook/dinov2-large --as expert --image_size 336
  visexpert try openai/clip-vit-large-patch14-336 --as encoder
  visexpert try Qwen/Qwen2.5-0.5B --as language
  visexpert try vit_base_patch16_224 --weights epoch_3.safetensors
  visexpert try eva02_large_patch14_448 --weights random        # sizes alone, without a download

For each role it says what the model is there (grid of tokens, width, input, parameters), how far it is from the model
library's own forward on the same input, and the lines for a configuration; or why not, in one sentence.
The exit code is 0 if the model works in any role that was asked for, else 2.
Families that were tried are listed in docs/families.md. VISEXPERT_TRACEBACK=1 shows where an error came from.
"""


def run(arguments: list[str]) -> Ending:
    """Try and print; exit code 2 where nothing works."""
    options = parser().parse_args(arguments)
    if not options.model.strip():
        raise ConfigError("MODEL is empty; name a folder ('.' for this one), a Hugging Face id or a model's name.")
    from visexpert.commands.trial import ROLES, Request, attempts  # heavy: after --help

    request = Request(
        model=options.model,
        weights=options.weights,
        image_size=options.image_size,
        layer=options.layer,
        dtype=options.dtype,
    )
    found: list[Attempt] = []
    for attempt in attempts(request, ROLES if options.role == "all" else (options.role,)):
        found.append(attempt)
        if not options.json:
            print(text_of(attempt, options.model), flush=True)
    if options.json:
        print(json.dumps([_as_json(attempt, options.model) for attempt in found], indent=2))
    if not any(attempt.works for attempt in found):
        sys.exit(NOTHING_WORKS)
    works = ", ".join(attempt.role for attempt in found if attempt.works)
    return Ending(
        f"{options.model} works as {works}; put the lines for a configuration into a file, FILE.",
        (("fit", "--config", "tove/tabletop", "--config", "FILE"),),
        aside=options.json,
    )


def text_of(attempt: Attempt, model: str) -> str:
    """What is printed of one attempt."""
    headline = {
        "works": "works",
        "differs": "loads, but differs",
        "refused": "refused",
        "error": "unexpected error",
    }[attempt.verdict]
    lines = [f"{attempt.role}: {headline}" + (f", {attempt.name}" if attempt.name else "")]
    if attempt.message:
        lines.append(f"  {shown(attempt.message)}")
    lines += [f"  {name}: {shown(value)}" for name, value in attempt.facts.items()]
    lines += [f"  difference of {shown(comparison)}" for comparison in attempt.comparisons]
    if attempt.works:
        lines += ["", *(f"    {line}" for line in attempt.yaml(model).splitlines())]
    return "\n".join([*lines, ""])


def _as_json(found: Attempt, model: str) -> dict[str, object]:
    written: dict[str, object] = {
        "role": found.role,
        "class": found.name,
        "verdict": found.verdict,
        "message": found.message,
        "facts": dict(found.facts),
        "comparisons": [{**asdict(each), "dtype": str(each.dtype), "equal": each.equal} for each in found.comparisons],
    }
    return {**written, "yaml": found.yaml(model)} if found.works else written


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert try",
        description="Try a model in each role that the package has: as a frozen expert, as the encoder to train, as "
        "the language\nmodel. Weights are read and run on two images or texts, on the CPU.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hugging Face id or name, see below")
    parser.add_argument(
        "--as",
        dest="role",
        default="all",
        choices=("expert", "encoder", "language", "all"),
        help="role to try it in (default: %(default)s)",
    )
    parser.add_argument("--weights", metavar="W", help="for a name: file, folder, Hugging Face id or tag; or random")
    parser.add_argument("--image_size", type=int, metavar="PX", help="side of the input (default: the model's own)")
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="block whose output is read, -1 is the last (default: an expert's last features, an encoder's -2)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="type of a language model's weights (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
