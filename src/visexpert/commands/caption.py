"""``visexpert caption RUN IMAGE...``: captions or answers for your own images."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert.commands.ending import Ending
from visexpert.commands.image_files import find_images
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, DataError, shown
from visexpert.io.reading import dump_json

if TYPE_CHECKING:
    from visexpert.captioning import Answer, Captioned, Captioner
    from visexpert.language import Decoding

SOME_FAILED, NONE_READ = 1, 2
"""Exit codes when some images could not be read, and when none could."""

MOST_MAPS = 64
"""Images that one figure of gate maps has room for."""

EMPTY = "(empty)"
"""Shown where the model wrote nothing."""

PROGRESS_FROM = 4
"""Batches from which on a progress bar is shown."""

EPILOG = """\
RUN may be a run of `visexpert fit`, or RUN/detached or RUN/merged inside it.

Each answer is one line `FILE: TEXT` on stdout, with (empty) where the model wrote nothing; all else goes to stderr. An
image that cannot be read is named in one sentence, the others are captioned all the same, and the exit code is 1 (0:
all were read; 2: none was, or nothing could be begun).
"""

log = logging.getLogger(__name__)


def run(arguments: list[str]) -> Ending:
    """Caption the images that the arguments name.

    Raises:
        ConfigError: An option is out of range, or RUN is not a run.
        DataError: A folder cannot be listed, the prompt is too long, or the figure cannot be written.
    """
    options = parser().parse_args(arguments)
    choice = _choice_of_tokens(options)
    paths = find_images(options.images, recursive=options.recursive)
    _check_figure(options.gates, paths)
    from visexpert.captioning import Captioner
    from visexpert.language import Decoding
    from visexpert.runs import load_run

    decoding = Decoding(**choice)
    captioner = Captioner(load_run(options.run), device=options.device, batch_size=options.batch_size)
    if options.gates is not None and not captioner.experts:
        raise ConfigError(
            f"--gates: '{options.run}' has no experts and hence no gate; leave it out, or name another run."
        )
    prompt = captioner.default_prompt if options.prompt is None else options.prompt
    if unknown := captioner.unknown_words(prompt):
        log.warning("The vocabulary lacks %s: the model reads <unk> instead.", ", ".join(map(repr, unknown)))
    failed = _caption(captioner, paths, prompt, decoding, options)
    if failed == len(paths):
        sys.exit(NONE_READ)
    figure = "" if options.gates is None else f"; gates are drawn in {options.gates}"
    drawing = ("caption", options.run, *options.images, "--gates", "gates.png")
    then: tuple[tuple[object, ...], ...] = (("serve", options.run),)
    return Ending(
        f"{len(paths) - failed} of {len(paths)} images answered{figure}",
        (drawing, *then) if captioner.experts and options.gates is None and len(paths) <= MOST_MAPS else then,
        aside=True,
        code=SOME_FAILED if failed else 0,
    )


def _caption(
    captioner: Captioner, paths: Sequence[Path], prompt: str, decoding: Decoding, options: argparse.Namespace
) -> int:
    """Caption and report; the number of images that could not be read."""
    from tqdm import tqdm

    short = len(paths) < PROGRESS_FROM * options.batch_size
    records: list[dict[str, Any]] = []
    drawn: list[Answer] = []
    entries = captioner.caption(paths, prompt, decoding=decoding)
    # disable=None: no bar unless stderr is a terminal.
    for entry in tqdm(entries, total=len(paths), unit="image", disable=True if short else None):
        if entry.answer is None:
            tqdm.write(f"visexpert: {shown(entry.error)}", file=sys.stderr)
        elif not options.json:
            tqdm.write(shown(f"{entry.path}: {entry.answer.text or EMPTY}"), file=sys.stdout)
        if entry.answer is not None and options.gates is not None:
            drawn.append(entry.answer)
        records.append(_record(entry, prompt))
    if options.json:
        print(dump_json(records, indent=2))
    if drawn:
        _draw(drawn, options.gates)
    return sum(record["error"] is not None for record in records)


def _record(entry: Captioned, prompt: str) -> dict[str, Any]:
    answer = entry.answer
    return {
        "image": str(entry.path),
        "prompt": prompt,
        "text": None if answer is None else answer.text,
        "experts": None if answer is None else answer.shares,
        "error": entry.error,
    }


def _draw(answers: Sequence[Answer], out: Path) -> None:
    import numpy as np

    from visexpert.report import gate_maps

    gates = [answer.gates_HWK for answer in answers if answer.gates_HWK is not None]
    if not gates:
        raise ConfigError(
            "--gates: the model of this run shows no gate (a blind control reads no image); leave it out."
        )
    try:
        gate_maps(np.stack([answer.image_HW3 for answer in answers]), np.stack(gates), answers[0].experts, out)
    except OSError as error:
        raise DataError(f"The figure {out} cannot be written ({error.strerror}); name another file.") from error


def _check_figure(out: Path | None, paths: Sequence[Path]) -> None:
    if out is None:
        return
    if out.is_dir() or out.suffix.lower() != ".png":
        raise ConfigError(f"--gates {out}: a figure is a PNG file; give a name that ends in .png.")
    if any(out.resolve() == path.resolve() for path in paths):
        raise ConfigError(f"--gates {out} is one of the images to caption; give the figure another name.")
    if len(paths) > MOST_MAPS:
        raise ConfigError(f"--gates has room for {MOST_MAPS} images, but there are {len(paths)}; name fewer.")


def _choice_of_tokens(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of :class:`~visexpert.language.Decoding` that were given.

    Raises:
        ConfigError: An option that has no effect without another one.
    """
    needs = {"length_penalty": "beams", "temperature": "sample", "top_k": "sample", "top_p": "sample", "seed": "sample"}
    given = {name: value for name in needs if (value := getattr(options, name)) is not None}
    for name in given:
        if not getattr(options, needs[name]):
            raise ConfigError(f"--{name} has no effect without --{needs[name]}; add that, or leave it out.")
    choice: dict[str, Any] = {**given, "max_new_tokens": options.max_new_tokens}
    if options.beams is not None:
        choice |= {"strategy": "beam", "num_beams": options.beams}
    elif options.sample:
        choice["strategy"] = "sample"
    return choice


def parser() -> Parser:
    """Return the command's parser."""
    description = "Caption images, or answer a question about them, with a finished run."
    parser = Parser(prog="visexpert caption", description=description, epilog=EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--prompt", help="a question, or words that ask for a caption (default: the run's own)")
    parser.add_argument("--recursive", action="store_true", help="also take the images in subfolders")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="images at once (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="one JSON list instead: image, prompt, text, experts, error"
    )
    output.add_argument("--gates", type=Path, metavar="OUT.png", help="draw which expert each image patch listens to")
    writing = parser.add_argument_group("decoding", "greedy, unless --beams or --sample is given")
    way = writing.add_mutually_exclusive_group()
    way.add_argument("--beams", type=int, metavar="N", help="search with N beams")
    way.add_argument("--sample", action="store_true", help="draw from the model's distribution")
    writing.add_argument(
        "--length_penalty",
        type=float,
        help="with --beams: 0 prefers the likeliest text, 1 per token (default: 1)",
    )
    writing.add_argument("--temperature", type=float, help="with --sample: below 1 prefers likelier words (default: 1)")
    writing.add_argument("--top_k", type=int, help="draw from the k likeliest words only (default: all)")
    writing.add_argument("--top_p", type=float, help="draw from the likeliest words of this probability (default: 1)")
    writing.add_argument("--seed", type=int, help="seed of --sample (default: 0)")
    writing.add_argument("--max_new_tokens", type=int, default=32, help="longest answer in tokens (default: 32)")
    return parser
