"""Follow a section of the quickstart as a newcomer does: in an empty folder, each block by what is installed.

``python -m tests.docs.follow BIN`` makes images with captions, runs the blocks with the programs in BIN, such as
.venv/bin, and prints what each took. It fails with the first command that fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from tests.docs.blocks import Block, blocks_of

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
SECTION = "Your own images, from training to export"
COLORS = ("red", "green", "blue", "yellow")


def section_of(page: Path, title: str) -> list[Block]:
    """Return the blocks under a heading of the second level.

    Raises:
        ValueError: The page has no such heading, or the section no block.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    heads = [number for number, line in enumerate(lines, 1) if line.startswith("## ")]
    begin = next((number for number in heads if lines[number - 1] == f"## {title}"), None)
    if begin is None:
        raise ValueError(f"{page} has no section {title!r}")
    end = next((number for number in heads if number > begin), len(lines) + 1)
    found = [block for block in blocks_of(page) if begin < block.line < end and block.kind != "text"]  # what is told
    if not found:
        raise ValueError(f"{page}: the section {title!r} has no block")
    return found


def write_photos(folder: Path) -> None:
    """Write images of one color each with their captions, 24 to train on and 8 to validate."""
    for part, count in (("train", 24), ("val", 8)):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            color = random.Random(f"{part} {number}").choice(COLORS)
            Image.new("RGB", (120, 90), color).save(folder / part / f"{number:02}.jpg")
            (folder / part / f"{number:02}.txt").write_text(f"a {color} wall\n", encoding="utf-8")


def follow(block: Block, folder: Path, environment: Mapping[str, str]) -> list[tuple[str, float]]:
    """Write a file, or run a block command by command; return the commands with their seconds.

    Raises:
        CalledProcessError: A command failed.
        ValueError: The captions are wrong.
    """
    if block.file is not None:
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return []
    if block.kind == "python":
        commands = {f"Python of line {block.line}": ["python", "-c", block.text]}
    else:
        commands = {shlex.join(words): words for words in block.commands}
    took = []
    for name, words in commands.items():
        print(f"$ {name}", flush=True)
        started = time.perf_counter()
        captions = words[:2] == ["visexpert", "caption"]
        done = subprocess.run(words, cwd=folder, env=environment, check=True, text=True, capture_output=captions)
        took.append((name, time.perf_counter() - started))
        if captions:
            print(done.stdout, flush=True)
            check_captions(done.stdout, folder)
    return took


def check_captions(told: str, folder: Path) -> None:
    """Check that each image is captioned by what the text file beside it says.

    Raises:
        ValueError: One is not, or none is captioned.
    """
    said = dict(line.split(": ", 1) for line in told.splitlines() if ".jpg: " in line)
    right = {image: (folder / image).with_suffix(".txt").read_text("utf-8").strip() for image in said}
    wrong = [f"{image}: {said[image]} (it is {truth})" for image, truth in right.items() if said[image] != truth]
    if wrong or not said:
        raise ValueError(f"wrong captions: {'; '.join(wrong) or 'there are none'}")


def main() -> None:
    """Follow the section and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bin", type=Path, metavar="BIN", help="folder with python and visexpert")
    programs = parser.parse_args().bin.absolute()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = str(programs)  # without Java, as most begin: METEOR takes half a minute a run
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "empty"
        environment["VISEXPERT_CACHE"] = str(Path(scratch) / "cache")
        write_photos(folder / "photos")
        try:
            took = [entry for block in section_of(PAGE, SECTION) for entry in follow(block, folder, environment)]
        except (subprocess.CalledProcessError, ValueError) as error:
            sys.exit(f"The quickstart fails: {error}")
        made = sorted(path.name for path in (folder / "my-encoder").iterdir())
    for name, seconds in took:
        print(f"{seconds:6.1f} s  {name}")
    print(f"{sum(seconds for _, seconds in took):6.1f} s  from images to an exported encoder: {', '.join(made)}")


if __name__ == "__main__":
    main()
