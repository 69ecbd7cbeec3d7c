"""``visexpert export`` of a student with MoLE: kept, folded, flattened, or refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.commands.test_export import LLAVA, refusal, write_run
from tests.data.formats import tokenizer_folder, write_jpeg, write_json
from visexpert.cli import main
from visexpert.commands.export_images import FolderImages
from visexpert.commands.export_mole import sources_of
from visexpert.errors import ConfigError, DataError
from visexpert.export.llava import check_language
from visexpert.runs import SavedRun, build, load_run
from visexpert.tabletop import TabletopData
from visexpert.vision import UsageMeter, equipped_blocks, fold

SMOKE = Path(__file__).parents[2] / "configs" / "movekd" / "smoke.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run of MoVE-KD as training would leave it, with MoLE far from its start; LLaVA can hold the run."""
    folder = tmp_path_factory.mktemp("movekd") / "run"
    config = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    config["model"]["init_args"].update(LLAVA)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    torch.manual_seed(0)
    model: Any = build(config, folder / "config.yaml")[0]
    for mole in equipped_blocks(model.clip).values():
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(("hub.", "anchor."))}
    checkpoint = {"state_dict": kept, "global_step": 7, "epoch": 0, "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.getbasetemp() / "export-mole-cache"))


def opened(run: Path) -> tuple[SavedRun, Any]:
    saved = load_run(run)
    model: Any = saved.model
    return saved, model.clip


def test_each_format_gets_what_it_has_a_place_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        main(["export", str(run), "--format", "torch_export,llava", "--out", str(tmp_path / "out")])
    assert re.search(r"llava .* MoLE: .*--mole fold.*onnx", caplog.text)
    said = capsys.readouterr().out
    assert "llava: one plain encoder (fold), NMSE " in said and "torch_export: one plain" not in said
    exact, folded = (
        json.loads((tmp_path / "out" / name / "fidelity.json").read_text(encoding="utf-8"))
        for name in ("torch_export", "llava")
    )
    assert exact["mole"] == {"treatment": "exact", "student": exact["mole"]["student"]}
    assert exact["patch_tokens"]["relative"] < 2e-5 and folded["logits"]["relative"] < 2e-5
    assert folded["mole"]["treatment"] == "fold" and folded["mole"]["usage"]["validation_images"] == 8
    assert folded["mole"]["against_student_on_validation_images"]["fold"]["nmse"] > 1e-3
    assert set(exact["licenses"]) == {"clip", "expert semantic", "expert edges"}
    assert folded["parameters"] < exact["parameters"]


def test_a_fold_is_by_the_use_on_validation_images(run: Path) -> None:
    saved, student = opened(run)
    meter = UsageMeter(student)
    data: Any = load_run(run).data
    for batch in data.image_dataloader("val"):
        meter.update(batch.images_01())
    expected = fold(student, meter.usage()).state_dict()
    source = sources_of(saved, ["hf"], layers=None, treatment=None, flatten=(1, 1e-4))["hf"]
    for key, value in source.clip.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    assert source.mole is not None and source.mole.on_val is not None and list(source.mole.on_val) == ["fold"]
    assert equipped_blocks(student)


def test_flattening_goes_on_from_the_fold(run: Path) -> None:
    saved, student = opened(run)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    source = sources_of(saved, ["hf", "onnx"], layers=None, treatment="flatten", flatten=(30, 3e-3))["hf"]
    report = source.mole
    assert report is not None and report.treatment == "flatten" and report.steps == 30 and report.on_val is not None
    assert report.on_val["flatten"]["nmse"] < report.on_val["fold"]["nmse"]
    assert not any(parameter.requires_grad for parameter in source.clip.parameters())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    with torch.no_grad():
        images = next(iter(saved.data.val_dataloader())).images_01()
        ours, theirs = (clip(images).tokens_BTD for clip in (source.clip, student))
    centered = theirs - theirs.mean((0, 1))
    nmse = float((ours - theirs).square().sum() / centered.square().sum())
    assert report.on_val["flatten"]["nmse"] == pytest.approx(nmse, rel=1e-4)


def test_what_cannot_be_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    saved, _ = opened(run)
    for treatment, name, message in (
        (
            "exact",
            "hf",
            r"--mole exact: hf .*fold or flatten.*--format onnx, torch_export, visexpert",
        ),
        ("fold", "visexpert", "--mole fold .*--format hf"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources_of(saved, [name], layers=None, treatment=treatment, flatten=(1, 1e-4))  # type: ignore[arg-type]
    plain = write_run(tmp_path / "plain")
    assert "has no MoLE; leave --mole out" in refusal([str(plain), "--format", "hf", "--mole", "fold", *out], capsys)
    for given, message in (
        (["--steps", "3"], "--steps 3 needs --mole flatten"),
        (["--lr", "0.1", "--mole", "fold"], "--lr 0.1 needs --mole flatten"),
        (["--mole", "flatten", "--steps", "0"], "--steps 0 must be above 0"),
        (["--mole", "flatten", "--lr", "-1"], "--lr -1.0 must be above 0"),
    ):
        assert message in refusal([str(run), "--format", "hf", *given, *out], capsys)
    assert not (tmp_path / "out").exists()


def test_without_the_runs_images_only_exact_works(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: TabletopData, stage: str | None = None) -> None:
        raise DataError("The images are gone")

    monkeypatch.setattr(TabletopData, "setup", gone)
    saved, student = opened(run)
    with pytest.raises(DataError, match=r"--mole fold.*The images are gone.*--data FOLDER"):
        sources_of(saved, ["hf"], layers=None, treatment=None, flatten=(1, 1e-4))
    sources = sources_of(saved, ["onnx", "visexpert"], layers=None, treatment=None, flatten=(1, 1e-4))
    assert all(source.clip is student for source in sources.values())


def test_a_fold_on_images_of_a_named_folder(run: Path, tmp_path: Path) -> None:
    for color in ("red", "blue"):
        write_jpeg(tmp_path / "own" / f"{color}.jpg", color, size=(40, 30))
    saved, student = opened(run)
    source = sources_of(saved, ["hf"], layers=None, treatment=None, flatten=(1, 1e-4), images=tmp_path / "own")["hf"]
    assert source.mole is not None and source.mole.usage is not None and source.mole.images == "named"
    assert source.mole.usage.num_images == 2
    meter = UsageMeter(student)
    for batch in FolderImages(tmp_path / "own", image_size=student.image_size).val_dataloader():
        meter.update(batch.images_01())
    for block, gates_E in meter.usage().gates.items():
        torch.testing.assert_close(source.mole.usage.gates[block], gates_E)
    (tmp_path / "bad.yaml").write_text("seed_everything: 1")
    with pytest.raises(ConfigError, match=r"bad\.yaml.* names no data.*; name a folder of images"):
        sources_of(opened(run)[0], ["hf"], layers=None, treatment=None, flatten=(1, 1e-4), images=tmp_path / "bad.yaml")


@pytest.mark.parametrize(("kind", "why"), [("gpt2", "embed_tokens"), ("cohere", "logit_scale"), ("phi", "the bias")])
def test_a_language_model_that_llava_cannot_hold_is_one_sentence(kind: str, why: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    with pytest.raises(ConfigError, match=why):
        check_language(model)


def training_only(folder: Path, *, batch_size: Any = 2) -> dict[str, Any]:
    """Write LLaVA conversations about three images, and one without an image: training data, no validation part."""
    colors = ("red", "blue", "green")
    turns = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "a box ."}]
    records: list[dict[str, Any]] = [{"id": "text", "conversations": turns}]
    for color in colors:
        write_jpeg(folder / f"{color}.jpg", color, size=(40, 30))
        records.append({"id": color, "image": f"{color}.jpg", "conversations": turns})
    write_json(folder / "talk.json", records)
    arguments = {"root": str(folder), "annotations": "talk.json", "image_size": 64, "batch_size": batch_size}
    arguments |= {"tokenizer": tokenizer_folder(folder / "words"), "num_workers": 0, "group_by_length": False}
    return {"class_path": "visexpert.data.LLaVAInstruct", "init_args": arguments}


def test_a_flattening_on_training_images_where_there_are_no_others(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (own / "config.yaml").write_text(yaml.safe_dump(config | {"data": training_only(tmp_path / "data")}))
    source = sources_of(load_run(own), ["hf"], layers=None, treatment="flatten", flatten=(40, 3e-3))["hf"]
    assert re.search("training images.*--data", caplog.text)
    report = source.mole
    assert report is not None and report.images == "training" and report.steps == 40
    assert report.usage is not None and report.usage.num_images == 3
    assert report.on_val is not None and report.on_val["flatten"]["nmse"] < report.on_val["fold"]["nmse"]


def test_a_working_file_names_other_images(run: Path, tmp_path: Path) -> None:
    """The file is read as by `visexpert fit`: with ${...} filled in, and a tokenizer that the run does not use."""
    working = tmp_path / "working.yaml"
    data = training_only(tmp_path / "data", batch_size="${trainer.accumulate_grad_batches}")
    working.write_text(yaml.safe_dump({"trainer": {"accumulate_grad_batches": 4}, "data": data}))
    saved, student = opened(run)
    source = sources_of(saved, ["hf"], layers=None, treatment="flatten", flatten=(2, 1e-4), images=working)["hf"]
    assert source.mole is not None and source.mole.usage is not None and source.mole.images == "named"
    assert source.mole.usage.num_images == 3 and source.mole.steps == 2
