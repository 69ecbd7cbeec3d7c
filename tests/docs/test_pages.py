"""Every block of the README and the pages runs as it stands; long commands take fewer steps, fits are parsed alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tests.data.formats import tokenizer_folder, write_coco, write_jpeg, write_json_lines, write_shards
from tests.docs.blocks import Block, blocks_of, run_page
from tests.end_to_end_parts import write_chats
from visexpert.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

ELSEWHERE = {
    "method.md": "tests/methods/test_contract.py",
    "own-expert.md": "tests/experts/test_hubs.py",
}
"""Pages whose blocks a test of their own runs."""

RUN = [
    *("--data.init_args.num_train=24", "--data.init_args.num_val=8", "--data.init_args.num_test=8"),
    *("--data.init_args.rendering.workers=0", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
    *("--trainer.accelerator=cpu", "--model.init_args.evaluation.caption_images=2"),
]
SMALLER = {"demo": ["--help"], "detach": ["--retune_steps", "2"], "merge": ["--steps", "2"]}

PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.name not in ELSEWHERE and any(block.why_not is None and block.kind for block in blocks_of(path))
)


def write_examples(root: Path) -> None:
    """Write what docs/your-data.md has in its folder ``data``."""
    tokenizer_folder(root / "tokenizer")
    for name, color in (("cat", "red"), ("dog", "blue")):
        write_jpeg(root / "photos" / f"{name}.jpg", color)
        (root / "photos" / f"{name}.txt").write_text(f"a {color} {name}", encoding="utf-8")
    lines = ["image,caption", "photos/cat.jpg,a red cat", 'photos/dog.jpg,"a blue dog , on a mat"']
    (root / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    write_json_lines(
        root / "questions.jsonl", [{"image": "photos/cat.jpg", "question": "what is it ?", "answer": "cat"}]
    )
    pictures = [Image.new("RGB", (12, 8), color) for color in ("red", "blue")]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "caption": ["a red cat", "a blue dog"]}, features=features)
    rows.save_to_disk(str(root / "saved"))
    write_shards(root / "shards", (3, 3))
    for part in ("train", "val"):
        write_jpeg(root / "coco" / f"{part}2017" / "1.jpg", "red")
        image = {"id": 1, "file_name": "1.jpg", "width": 12, "height": 8}
        write_coco(root / "coco" / "annotations" / f"captions_{part}2017.json", [image], [(1, "a red cat")])
    write_chats(root / "llava", "conversations.json", style="vicuna_v1", images="images")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with photos and a finished run, ``runs/tove``, which the pages share."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["visexpert"])
        patch.setenv("VISEXPERT_CACHE", str(folder / "cache"))
        patch.setenv("PL_GLOBAL_SEED", "0")
        for name in ("photo.png", "folder/one.png", "folder/two.png"):
            Path(name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (48, 32), (200, 30, 30)).save(name)
        write_examples(folder / "data")
        configs = ROOT / "configs" / "tove"
        start = ["--config", str(configs / "tabletop.yaml"), "--config", str(configs / "demo.yaml")]
        main(["fit", *start, "--run", "runs/tove", "--model.init_args.use=[semantic,depth]", *RUN])
        yield folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_what_a_page_says_to_type_works(page: Path) -> None:
    assert run_page(page, SMALLER) > 0


def test_what_the_readme_says_to_type_works(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a run of its own; the page on what comes after training exports the same, so that nothing is written here."""
    shutil.copytree(place / "runs/tove", tmp_path / "runs/tove", ignore=shutil.ignore_patterns("detached", "merged"))
    shutil.copy(place / "photo.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    exported: list[str] = []

    def write(sources: object, out: Path, **_: object) -> dict[str, object]:
        exported.append(str(out))
        return {}

    monkeypatch.setattr("visexpert.export.export", write)
    assert run_page(ROOT / "README.md", SMALLER) > 0
    assert {path.name for path in Path("runs/tove").iterdir()} >= {"detached", "merged"} and exported == ["my-clip"]


def test_blocks_are_found_with_what_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\n# mine.py\nx = 1\n```\n\n<!-- not run: needs eight GPUs -->\n```bash\nvisexpert fit \\\n"
        "  --run a  # comment\n```\n\n```\nplain\n```\n",
        encoding="utf-8",
    )
    file, command, plain = blocks_of(page)
    assert (file.kind, file.line, file.file, file.why_not) == ("python", 4, "mine.py", None)
    assert command.commands == [["visexpert", "fit", "--run", "a"]] and command.why_not == "needs eight GPUs"
    assert plain == Block("", "plain\n", 15, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nassert 1 == 2\n```\n", r"page\.md:2: AssertionError"),
        ("```bash\nvisexpert fitt\n```\n", r"page\.md:2: .*"),
        ("```bash\nmake demo\n```\n", r"page\.md:2: .*make is no command"),
        ("```yaml\na: 1\n```\n", r"page\.md:2: .*'yaml' is neither"),
    ],
)
def test_a_block_that_fails_is_named_by_its_line(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=said):
        run_page(page, SMALLER)
    assert os.getcwd() != str(ROOT)
