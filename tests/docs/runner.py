"""Run the blocks of a page at smoke scale, or only parse them; see rules.py for what does not run as it stands.

Blocks of one page share a folder and Python's names. Equal fits on several pages run once.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from PIL import Image

from tests.data.formats import tokenizer_folder, write_coco, write_jpeg, write_json_lines, write_shards
from tests.docs.blocks import Block, blocks_of
from tests.docs.follow import write_photos
from tests.docs.rules import Rule, rule_of
from tests.end_to_end_parts import write_chats
from visexpert import trust
from visexpert.cli import main
from visexpert.commands.catalog import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
PAGES = tuple(page for page in SITE if any(block.kind != "text" for block in blocks_of(page)))
"""Every page with a block that runs."""

ASKED = {"runs/tove": ("--config", "tove/tabletop")}
"""Runs that a page reads without having trained them: the fit that another page begins with."""


def write_surroundings(folder: Path) -> None:
    """Write what a page takes for granted: photos, data in every form, a model and a configuration of one's own."""
    for name in ("photo.png", "photo.jpg", "folder/one.png", "folder/two.png"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (48, 32), (200, 30, 30)).save(folder / name)
    write_examples(folder / "data")
    write_photos(folder / "photos")
    shutil.copy(ROOT / "configs/tove/smoke.yaml", folder / "mine.yaml")
    shutil.copytree(ROOT / "src/visexpert/tabletop/zoo/weights/clip", folder / "my-vit")
    (folder / "logs").mkdir()
    for path in (ROOT / "tests/report/data").glob("*_results.json"):
        shutil.copy(path, folder / "logs")


def write_examples(root: Path) -> None:
    """Write what docs/your-data.md has in its folder ``data``."""
    tokenizer_folder(root / "tokenizer")
    for name, color in (("cat", "red"), ("dog", "blue")):
        write_jpeg(root / "photos" / f"{name}.jpg", color)
        (root / "photos" / f"{name}.txt").write_text(f"a {color} {name}", encoding="utf-8")
    for place, label in ((place, label) for place in ("train", "val") for label in ("cat", "dog")):
        write_jpeg(root / "classes" / place / label / "1.jpg", "red" if label == "cat" else "blue")
    lines = ["image,caption", "photos/cat.jpg,a red cat", 'photos/dog.jpg,"a blue dog , on a mat"']
    (root / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    write_json_lines(
        root / "questions.jsonl", [{"image": "photos/cat.jpg", "question": "what is it ?", "answer": "cat"}]
    )
    pictures = [Image.new("RGB", (12, 8), color) for color in ("red", "blue")]
    columns = {"image": pictures, "caption": ["a red cat", "a blue dog"], "label": [0, 1]}
    classes = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "label": classes})
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(str(root / "saved"))
    write_shards(root / "shards", (3, 3))
    for part in ("train", "val"):
        write_jpeg(root / "coco" / f"{part}2017" / "1.jpg", "red")
        image = {"id": 1, "file_name": "1.jpg", "width": 12, "height": 8}
        write_coco(root / "coco" / "annotations" / f"captions_{part}2017.json", [image], [(1, "a red cat")])
    write_chats(root / "llava", "conversations.json", style="vicuna_v1", images="images")


class Runner:
    """Runs pages; equal fits of shipped configurations run once.

    Args:
        shared: Folder for the runs that pages share.
        parse: Whether commands are only parsed, and Python only compiled.
    """

    def __init__(self, shared: Path, *, parse: bool = False) -> None:
        self.shared, self.parse = shared, parse
        self.fits: dict[tuple[str, ...], Path] = {}

    def page(self, page: Path) -> int:
        """Run the blocks of a page in the working directory; return how many there were.

        Raises:
            AssertionError: A block failed; the message begins with page and line.
        """
        names: dict[str, Any] = {"__name__": "page"}
        blocks = [block for block in blocks_of(page) if block.kind != "text"]
        for block in blocks:
            try:
                self._block(page.name, block, names)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error
        return len(blocks)

    def _block(self, page: str, block: Block, names: dict[str, Any]) -> None:
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            code = compile(block.text, f"line {block.line}", "exec")
            if not self.parse:
                self._provide(block.text)
                with mock.patch.object(sys, "path", [str(Path.cwd()), *sys.path]):  # as of a Python started here
                    exec(code, names)
        elif block.kind == "bash":
            for words in block.commands:
                self._command(rule_of(page, words), words)
        else:
            raise ValueError(f"a block of {block.kind!r} is neither a file, Python nor commands")

    def _command(self, rule: Rule | None, typed: Sequence[str]) -> None:
        asks = any(word == "--help" or word.endswith(".help") for word in typed)
        words = list(typed) if rule is None or asks else rule.applied(typed)
        if not words:
            return
        words = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
        code = 0
        if words[0] == "visexpert":
            code = self._ours(words[1:], parse=self.parse or (rule is not None and rule.parsed))
        elif words[0] == "make":
            subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        elif words[0] == "python":
            if not self.parse:
                subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        else:
            raise ValueError(
                f"{words[0]} is no command of ours: a rule must say what runs instead, or why nothing does"
            )
        expected = 0 if rule is None or self.parse else rule.code
        if code != expected:
            raise ValueError(f"visexpert {typed[1]} ended with {code}, not {expected}")

    def _ours(self, words: list[str], *, parse: bool) -> int:
        """Run a command of ours in this process; return its exit code."""
        name, *rest = words
        parse = parse or (name == "serve" and find_spec("gradio") is None)
        if parse and name not in ("fit", "validate", "test", "predict"):
            COMMANDS[name].make_parser().parse_args(trust.take(rest)[0])
            return 0
        if parse and name != "fit":
            return 0  # RUN's own configuration says what they take
        if name == "fit" and not any(word == "--help" or word.endswith(".help") for word in rest):
            return _call([*words, "--print_config"]) if parse else self._fit(rest)
        self._provide(*rest)
        return _served(words) if name == "serve" else _call(words)

    def _fit(self, arguments: list[str]) -> int:
        """Fit, or copy the run of an equal fit."""
        run = arguments[arguments.index("--run") + 1] if "--run" in arguments else None
        configs = [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--config"]
        alone = "--ckpt_path" in arguments or "--overwrite" in arguments
        if run is None or alone or any(Path(config).exists() for config in configs):
            self._provide(run or "")
            return _call(["fit", *arguments])
        begin = arguments.index("--run")
        key = tuple(arguments[:begin] + arguments[begin + 2 :])
        if key not in self.fits:
            folder = self.shared / f"{len(self.fits)}"
            if code := _call(["fit", *key, "--run", str(folder)]):
                return code
            self.fits[key] = folder
        if not Path(run).exists():
            shutil.copytree(self.fits[key], run)
        return 0

    def _provide(self, *texts: str) -> None:
        """Put runs into place that a page reads and another one trains."""
        for run, arguments in ASKED.items():
            if any(run in text for text in texts) and not Path(run).exists():
                words = ["visexpert", "fit", *arguments, "--run", run]
                self._command(rule_of("", words), words)
        merged = Path("runs/tove/merged")
        if any(str(merged) in text for text in texts) and not merged.exists():
            self._command(rule_of("", ["visexpert", "merge"]), ["visexpert", "merge", "runs/tove"])


def _call(words: Iterable[str]) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _served(words: list[str]) -> int:
    """Serve until the page was asked for once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = []

    class Once:
        def wait(self) -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
                asked.append(page.status)
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with mock.patch("visexpert.commands.serve.Event", Once):
        code = _call([*words, "--port", str(port)])
    signal.signal(signal.SIGTERM, before)
    assert asked == [200], asked
    return code
