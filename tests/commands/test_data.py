"""``visexpert data check``: what is there, what is missing, and where to get it."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.data.formats import jpeg_bytes, tokenizer_folder, write_json_lines, write_karpathy, write_shards
from visexpert.cli import USAGE_ERROR, main

IMAGES = [(split, "val2014", "red", ["a dog"]) for split in ("train", "val", "test")]


def config(root: Path, **more: object) -> Path:
    source = "visexpert.data"
    sources = {
        "coco": {"class_path": f"{source}.COCOCaptions", "init_args": {"root": str(root / "coco"), "restval": True}},
        "cc3m": {
            "class_path": f"{source}.CC3M",
            "init_args": {"root": str(root / "cc3m"), "train": "{00000..00001}.tar"},
        },
        "pope": {"class_path": f"{source}.POPE", "init_args": {"root": "${pope_root}", "images": str(root / "coco")}},
    }
    arguments = {"sources": sources, "train": {"coco": None, "cc3m": None}, "test": ["coco", "pope"]} | more
    content = {"pope_root": str(root / "pope"), "data": {"class_path": f"{source}.MixedData", "init_args": arguments}}
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def check(*arguments: object, code: int | None) -> None:
    if code is None:
        main(["data", "check", *map(str, arguments)])
        return
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", *map(str, arguments)])
    assert ended.value.code == code


def write_all(root: Path) -> None:
    write_karpathy(root / "coco", IMAGES)
    (root / "coco" / "train2014").mkdir()
    write_shards(root / "cc3m", [3, 4])
    for kind in ("random", "popular", "adversarial"):
        record = {"question_id": 1, "image": "COCO_val2014_000000000002.jpg", "text": "a cat?", "label": "no"}
        write_json_lines(root / "pope" / f"coco_pope_{kind}.json", [record])


def test_everything_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    check(config(tmp_path, tokenizer=tokenizer_folder(tmp_path / "words")), code=None)
    out = capsys.readouterr().out
    assert "coco (COCOCaptions): train, test" in out and "pope (POPE): test" in out
    assert "train: 1 rows; images of 1 looked for" in out
    assert "train: 7 records in 2 shards" in out
    assert "MISSING" not in out and "\nDone: nothing is missing.\nNext: visexpert plan --config " in out


def test_an_overlay_is_offered_with_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without a model's class can be checked, but neither planned nor trained alone."""
    write_all(tmp_path)
    overlay = config(tmp_path, tokenizer=tokenizer_folder(tmp_path / "words"))
    base = tmp_path / "base.yaml"
    base.write_text("model: {class_path: visexpert.methods.ToVE}", encoding="utf-8")
    check(overlay, code=None)
    out = capsys.readouterr().out
    assert f"fit --config BASE --config {overlay}" in out and f"plan --config BASE --config {overlay}" in out
    check(base, overlay, code=None)
    assert f"fit --config {base} --config {overlay}" in capsys.readouterr().out


def test_what_is_missing_is_listed_with_source_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(config(tmp_path, tokenizer="some/model"), code=USAGE_ERROR)
    streams = capsys.readouterr()
    missing = [line for line in streams.out.splitlines() if "MISSING" in line]
    assert len(missing) == 3 + 1 + 4 + 3  # COCO's three, the shards, POPE's four, the tokenizer in each
    assert any("val2014.zip (6.6 GB)" in line for line in missing)
    assert any("00000.tar; get it from https://github.com/rom1504/img2dataset" in line for line in missing)
    assert any("coco_pope_popular.json" in line for line in missing)
    assert any("hf download some/model" in line for line in missing)
    assert "11 things that the data needs are missing" in streams.err


def test_images_that_annotations_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    check(config(tmp_path), "--parts", "test", code=USAGE_ERROR)
    out = capsys.readouterr().out
    assert out.count("MISSING") == 2 and "1 not there, such as" in out and "cc3m" not in out
    check(config(tmp_path), "--parts", "test", "--images", "none", code=None)


def test_broken_annotations_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    (tmp_path / "pope" / "coco_pope_random.json").write_text("no json\n")
    check(config(tmp_path), "--parts", "test", code=USAGE_ERROR)
    out = capsys.readouterr().out
    assert "Line 1 of" in out and "BROKEN" in out and "MISSING" not in out


def test_broken_records_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    path = tmp_path / "coco" / "dataset_coco.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    index = next(place for place, image in enumerate(content["images"]) if image["split"] == "train")
    content["images"][index] = {"split": "train"}
    path.write_text(json.dumps(content), encoding="utf-8")
    check(config(tmp_path), "--parts", "train", "test", code=USAGE_ERROR)
    assert capsys.readouterr().out.count(f"images[{index}]") == 1


def test_later_files_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"init_args": {"train": None, "test": ["pope"]}}}))
    check(config(tmp_path), overlay, code=None)
    assert "coco (" not in capsys.readouterr().out


def test_sources_of_a_later_file_replace_the_earlier_ones_as_in_a_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path)
    whole = config(tmp_path, tokenizer=tokenizer_folder(tmp_path / "words"))
    coco = yaml.safe_load(whole.read_text())["data"]["init_args"]["sources"]["coco"]
    later = tmp_path / "later.yaml"
    arguments = {"sources": {"coco": coco}, "train": {"coco": None}, "test": ["coco"]}
    later.write_text(yaml.safe_dump({"data": {"init_args": arguments}}))
    check(whole, later, code=None)
    out = capsys.readouterr().out
    assert "coco (COCOCaptions): train, test" in out and "CC3M" not in out and "POPE" not in out


def test_many_missing_shards_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    for shard in (tmp_path / "cc3m").glob("*.tar"):
        shard.unlink()
    check(config(tmp_path, tokenizer=tokenizer_folder(tmp_path / "words")), code=USAGE_ERROR)
    missing = [line for line in capsys.readouterr().out.splitlines() if "A shard of CC3M" in line]
    assert len(missing) == 1 and "00000.tar" in missing[0] and "And 1 more like it." in missing[0]


def test_data_that_makes_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(Path(__file__).parents[2] / "configs" / "tove" / "smoke.yaml", code=None)
    assert "TabletopData makes its own data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: {}", "names no data"),
        (
            "data: {class_path: visexpert.data.POPE, init_args: {root: x, kind: y}}",
            "no setting 'kind'; did you mean 'kinds'",
        ),
        ("data: {class_path: visexpert.data.POPE, init_args: {root: x, kinds: [odd]}}", "must name some of random"),
        ("data: ${nothing}", "cannot be read"),
        (": :", "cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(
    tmp_path: Path, content: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    check(path, code=USAGE_ERROR)
    assert sentence in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert "Nothing is downloaded" in capsys.readouterr().out


def with_model(root: Path, **init_args: object) -> Path:
    """A configuration whose data is there, of a model."""
    write_all(root)
    path = config(root, tokenizer=tokenizer_folder(root / "words"))
    content = yaml.safe_load(path.read_text())
    content["model"] = {"class_path": "visexpert.methods.ToVE", "init_args": init_args}
    path.write_text(yaml.safe_dump(content))
    return path


def test_weights_are_listed_with_place_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = {"class_path": "visexpert.vision.ClipEncoder", "init_args": {"source": "openai/clip-vit-base-patch16"}}
    clip["init_args"]["architecture"] = "ViT-B-16-quickgelu"  # type: ignore[index]
    here = {"class_path": "visexpert.tabletop.TinyExpert", "init_args": {"source": "zoo:depth"}}
    gone = {"class_path": "visexpert.experts.TimmExpert", "init_args": {"model": "vit_tiny_patch16_224.augreg_in21k"}}
    made = {"class_path": "visexpert.experts.KorniaEdges", "init_args": {"image_size": 32}}
    language = {"class_path": "visexpert.language.PrefixLM", "init_args": {"source": "some/language-model"}}
    experts = {"depth": here, "vit": gone, "edges": made, "unused": gone}
    path = with_model(tmp_path, clip=clip, experts=experts, use=["depth", "vit", "edges"], language=language)
    check(path, code=USAGE_ERROR)
    told = capsys.readouterr()
    lines = told.out.partition("pretrained weights\n")[2].splitlines()
    assert len(lines) == 4 and lines[1].split()[:2] == ["ok", "depth:"]
    # ViT-B/16's image tower has 86 M parameters, ViT-Ti/16 without its head 5.5 M.
    assert "(about 0.34 GB as float32)" in lines[0] and "hf download openai/clip-vit-base-patch16`" in lines[0]
    assert "(about 0.022 GB as float32)" in lines[2]
    assert "language:" in lines[3] and "config.json of 'some/language-model' is not in the cache" in lines[3]
    assert lines[3].endswith("Without its config.json its size is unknown.")
    assert "3 things that the data needs are missing" in told.err
    check(path, "--no_weights", code=None)


def test_an_experts_own_module_lies_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/own-expert.md says, with nothing on PYTHONPATH."""
    page = (Path(__file__).parents[2] / "docs" / "own-expert.md").read_text(encoding="utf-8")
    code, settings = (page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "yaml"))
    (tmp_path / "my_experts.py").write_text(code, encoding="utf-8")
    mine = yaml.safe_load(settings)["model"]["init_args"]["experts"]["mine"]
    path = with_model(tmp_path, experts={"mine": mine})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    check(path, code=None)
    assert "pretrained weights\nDone: nothing is missing.\n" in capsys.readouterr().out


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = jpeg_bytes("red") if name.endswith("jpg") else b"a dog"
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))


@pytest.mark.parametrize(
    ("names", "said", "told"),
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], None, "4 of the first 16 records of .*00000.tar.*has no caption"),
        (["a.b.1.jpg", "a.b.1.txt", "a.b.2.jpg", "a.b.2.txt"], None, "write keys without dots"),
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], 5, "00000_stats.json states 5 records for .* holds 2"),
    ],
)
def test_shards_are_read_as_in_training(
    names: list[str], said: int | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "00000.tar", names)
    if said is not None:
        (tmp_path / "00000_stats.json").write_text(f'{{"successes": {said}}}')
    given = {"root": str(tmp_path), "train": "00000.tar", "tokenizer": tokenizer_folder(tmp_path / "words")}
    whole = {"class_path": "visexpert.data.CC3M", "init_args": given}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": whole}))
    check(tmp_path / "c.yaml", code=USAGE_ERROR)
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  BROKEN")]
    assert len(broken) == 1 and re.search(told, broken[0])


def test_what_is_no_tar_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00000.tar").write_bytes(b"<html>not found</html>" * 40)
    whole = {"class_path": "visexpert.data.CC3M", "init_args": {"root": str(tmp_path), "train": "00000.tar"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": whole}))
    check(tmp_path / "c.yaml", code=USAGE_ERROR)
    out = capsys.readouterr().out
    assert "BROKEN" in out and "00000.tar" in out and "method" not in out and "\\n" not in out
