"""The code, commands and paths of CONTRIBUTING.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import tokenizer_folder, write_jpeg, write_json_lines

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(name: str) -> Any:
    """The class of an example, defined by running its block."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}(" in code)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names[name]


def test_the_data_set_is_read_and_what_is_broken_is_skipped(tmp_path: Path) -> None:
    records = [
        {"image": "a.jpg", "question": "what colour is it ?", "answer": "red"},
        {"image": "b.jpg", "question": "what colour is it ?"},
        {"image": "b.jpg", "question": "what colour is it ?", "answer": "blue"},
    ]
    write_json_lines(tmp_path / "test.jsonl", records)
    for name, color in (("a", "red"), ("b", "blue")):
        write_jpeg(tmp_path / "images" / f"{name}.jpg", color)
    words = tokenizer_folder(tmp_path / "words")
    more = {"tokenizer": words, "image_size": 8, "num_workers": 0, "max_broken": 0.5}
    data = example("Signs")(root=str(tmp_path), eval_batch_size=2, **more)
    (need,) = data.needs("train")
    assert need.path == tmp_path / "train.jsonl" and need.found is None
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert [(item.kind, item.answer) for (item,) in batch.items] == [("vqa", "red"), ("vqa", "blue")]
    assert batch.images_BCHW.shape == (2, 3, 8, 8)


def test_the_metric_scores_all_that_it_was_given() -> None:
    metric = example("ExactMatch")()
    assert metric.compute() == {}
    metric.update(["red", " two "], ["blue", "two"])
    metric.update(["yes", "no"], ["yes", "no"])
    assert metric.compute() == {"accuracy": pytest.approx(0.75)}


def test_every_make_target_and_path_is_there() -> None:
    makefiles = [ROOT / "Makefile", *(ROOT / "make").glob("*.mk")]
    targets = set(re.findall(r"^([a-z-]+):", "\n".join(path.read_text() for path in makefiles), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", PAGE)) - {"make"}
    assert {"install", "check", "test", "results-tove"} <= named
    assert named - targets == set()
    paths = re.findall(r"`((?:src|tests|benchmarks|docs|make|configs)/[\w./-]+)`", PAGE)
    paths += [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert len(paths) > 10 and [path for path in paths if not (ROOT / path).exists()] == []
