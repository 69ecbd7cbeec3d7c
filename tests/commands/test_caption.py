"""``visexpert caption`` from the command line, on a finished smoke run and one without experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from visexpert.cli import main

SMOKE = Path(__file__).parents[2] / "configs" / "tove" / "smoke.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``tove`` and ``merged`` (no experts), each trained for one step."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        for name, extra in {"tove": [], "merged": ["--model.init_args.use=[]"]}.items():
            main(
                [
                    "fit",
                    "--config",
                    str(SMOKE),
                    "--run",
                    str(folder / name),
                    "--trainer.max_steps",
                    "1",
                    "--test_after_fit",
                    "false",
                    "--trainer.val_check_interval",
                    "1",
                    *extra,
                ]
            )
        yield folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of different sizes and kinds."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, (name, size) in enumerate({"a.png": (30, 50), "b.jpg": (96, 96), "c.gif": (200, 20)}.items()):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    return folder


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    capsys.readouterr()
    main(["caption", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("run", ["tove", "merged"])
def test_one_line_an_image(runs: Path, images: Path, capsys: pytest.CaptureFixture[str], run: str) -> None:
    written = lines(capsys, runs / run, images)
    assert [line.split(": ")[0] for line in written] == [str(images / name) for name in ("a.png", "b.jpg", "c.gif")]
    assert lines(capsys, runs / run, images, "--prompt", "describe the image", "--batch_size", 1) == written
    assert lines(capsys, runs / run, images / "b.jpg") == written[1:2]
    assert lines(capsys, runs / run, images, "--beams", 1) == written
    assert lines(capsys, runs / run, images, "--sample", "--top_k", 1) == written


def test_json_and_gates(runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "gates.png"
    arguments = (runs / "tove", images, "--json", "--gates", out, "--prompt", "is there a cube ?")
    records = json.loads("\n".join(lines(capsys, *arguments, "--max_new_tokens", 3)))
    assert [record["image"] for record in records] == [str(images / name) for name in ("a.png", "b.jpg", "c.gif")]
    for record in records:
        assert record["prompt"] == "is there a cube ?" and record["error"] is None
        assert len(record["text"].split()) <= 3
        assert record["experts"].keys() == {"semantic", "depth"}
        assert sum(record["experts"].values()) == pytest.approx(1, abs=1e-5)
    with Image.open(out) as figure:
        assert figure.format == "PNG" and figure.width > 500
    merged = json.loads("\n".join(lines(capsys, runs / "merged", images, "--json")))
    assert [record["experts"] for record in merged] == [None] * 3


def test_a_broken_image_stops_no_other(runs: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "b.jpg").write_text("no image", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        lines(capsys, runs / "tove", images, images / "gone.png")
    output = capsys.readouterr()
    assert ended.value.code == 1
    assert [line.split(": ")[0] for line in output.out.splitlines()] == [str(images / "a.png"), str(images / "c.gif")]
    errors = [line for line in output.err.splitlines() if line]
    assert len(errors) == 4 and errors[2] == "Done: 2 of 4 images answered" and errors[3].startswith("Next: visexpert ")
    assert errors[0].startswith(f"visexpert: The image {images / 'b.jpg'} cannot be read")
    assert errors[1] == f"visexpert: The image {images / 'gone.png'} does not exist; correct the path."
    with pytest.raises(SystemExit) as ended:
        lines(capsys, runs / "tove", images / "b.jpg", "--json")
    assert ended.value.code == 2  # not one was read
    record = json.loads(capsys.readouterr().out)[0]
    assert record["text"] is None and record["experts"] is None and "cannot be read" in record["error"]


def test_an_empty_text_is_said_to_be_empty(
    runs: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visexpert.language.CrossAttentionDecoder.generate", lambda self, vision, ids, **_: [[]] * 1)
    assert lines(capsys, runs / "tove", images / "a.png") == [f"{images / 'a.png'}: (empty)"]
    assert json.loads("\n".join(lines(capsys, runs / "tove", images / "a.png", "--json")))[0]["text"] == ""


def test_unknown_words_are_named(
    runs: Path, images: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="visexpert"):
        lines(capsys, runs / "tove", images / "a.png", "--prompt", "where is the zebra ?")
    assert "The vocabulary lacks 'where', 'zebra': the model reads <unk> instead." in caplog.messages


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["https://a.org/b.png"], "https://a.org/b.png"),
        (["a.png", "--seed", "3"], "--seed has no effect without --sample"),
        (["a.png", "--length_penalty", "0"], "--length_penalty has no effect without --beams"),
        (["a.png", "--beams", "0"], "Decoding.num_beams is 0, but must lie in"),
        (["a.png", "--sample", "--top_p", "2"], "Decoding.top_p is 2.0"),
        (["a.png", "--beams", "2", "--sample"], "visexpert caption: argument --sample: not allowed with argument --b"),
        (["a.png", "--max_new_tokens", "many"], "visexpert caption: argument --max_new_tokens: invalid int value"),
        (["a.png", "--gates", "a.png"], "--gates a.png is one of the images"),
        (["a.png", "--gates", "a.jpg"], "--gates a.jpg: a figure is a PNG file"),
        ([*map(str, range(65)), "--gates", "g.png"], "--gates has room for 64 images, but there are 65"),
        (["a.png", "--prompt", "red " * 60], "CrossAttentionDecoder: a text item of 61 tokens is longer than"),
        (["a.png", "--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    runs: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(images)
    refused(["caption", str(runs / "tove"), *arguments], sentence, capsys)
    assert Image.open(images / "a.png").size == (50, 30)  # as it was


def test_runs_that_are_none(runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(images / "a.png")
    refused(["caption", str(tmp_path), image], f"'{tmp_path}' is not a run: it has no config.yaml", capsys)
    refused(["caption", image], "the following arguments are required: IMAGE", capsys)
    merged = str(runs / "merged")
    refused(["caption", merged, image, "--gates", "g.png"], "has no experts and hence no gate", capsys)


def refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert error.startswith("visexpert: ") and sentence in error and len(error.splitlines()) == 1, error
