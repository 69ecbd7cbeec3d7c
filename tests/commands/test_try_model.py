"""``visexpert try`` on tiny models in real formats, one per role, and on models that it must refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, LlamaConfig, LlamaForCausalLM

from tests.experts.tiny_models import CLIP_VISION, TEXT, randomized, saved
from tests.io.hub import put_in_cache
from tests.language.helpers import llama
from tests.language.llava_models import randomize
from tests.vision.test_choosing import CLASSES, folder
from visexpert.cli import main
from visexpert.commands.trial import roles
from visexpert.experts import TransformersExpert
from visexpert.experts.transformers import EncoderMap
from visexpert.language import PrefixLM
from visexpert.vision import ClipEncoder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoConfig.for_model("clip", vision_config=CLIP_VISION, text_config=TEXT)
    return saved(randomized(AutoModel.from_config(config)), CLIPImageProcessor(), tmp_path_factory.mktemp("My-CLIP"))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    fields = {name: value for name, value in llama().items() if name != "model_type"}
    randomize(LlamaForCausalLM(LlamaConfig(**fields))).save_pretrained(folder)
    return folder


def tried(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    """Return what ``--json`` prints, and check the exit code."""
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as caught:
            main(["try", *map(str, arguments), "--json"])
        assert caught.value.code == code
    else:
        main(["try", *map(str, arguments), "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_clip__expert_and_clip_but_no_language_model(clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert, clip, language = tried(capsys, clip_folder)
    assert [row["verdict"] for row in (expert, clip, language)] == ["works", "works", "refused"]
    assert (expert["class"], expert["facts"]["grid"]) == ("TransformersExpert", "4 x 4 = 16 tokens")
    assert (clip["class"], clip["facts"]["layer"], clip["facts"]["width"]) == ("ClipEncoder", "-2", "16")
    (seen,), (taught,) = expert["comparisons"], clip["comparisons"]
    assert seen["reference"] == "transformers: its output, last_hidden_state, tokens 1 to 16 of 17"
    assert (
        taught["reference"] == "transformers: encoder.layers.1, tokens 1 to 16 of 17"
    )  # of three: the one before the last
    assert max(seen["difference"], taught["difference"]) < 1e-5 and min(seen["scale"], taught["scale"]) > 0.1
    assert "is no causal language model" in language["message"]
    # The lines for a configuration build the same.
    written = yaml.safe_load(expert["yaml"])["model"]["init_args"]["experts"]
    (name,) = written
    assert name.startswith("my_clip") and written[name]["class_path"] == "visexpert.experts.TransformersExpert"
    assert TransformersExpert(**written[name]["init_args"]).grid_hw == (4, 4)
    assert ClipEncoder(**yaml.safe_load(clip["yaml"])["model"]["init_args"]["clip"]["init_args"]).width == 16


def test_options_of_an_encoder(clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert, clip, _ = tried(capsys, clip_folder, "--image_size", 48, "--layer", -1)
    for row in (expert, clip):
        assert row["verdict"] == "works" and row["facts"]["grid"] == "6 x 6 = 36 tokens"
        assert row["comparisons"][0]["reference"] == "transformers: its output, last_hidden_state, tokens 1 to 36 of 37"
        assert "image_size: 48" in row["yaml"] and "layer: -1" in row["yaml"]


def test_a_language_model_is_held_against_rows_of_its_library(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (language,) = tried(capsys, llama_folder, "--as", "language")
    assert (language["verdict"], language["class"], language["facts"]["family"]) == ("works", "PrefixLM", "llama")
    plain, behind, answer = language["comparisons"]
    assert "behind an image" in behind["what"] and "greedy answer" in answer["what"] and answer["difference"] == 0
    assert max(plain["difference"], behind["difference"]) < 1e-4 < plain["scale"]
    arguments = yaml.safe_load(language["yaml"])["model"]["init_args"]["language"]["init_args"]
    assert PrefixLM(**arguments).width == 16
    expert, clip = tried(capsys, llama_folder, "--as", "expert", code=2) + tried(
        capsys, llama_folder, "--as", "encoder", code=2
    )
    assert expert["verdict"] == clip["verdict"] == "refused" and "model_type 'llama'" in clip["message"]


def test_a_language_model_at_a_revision(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_cache(monkeypatch, tmp_path, "org/llama", llama_folder, refs=("v2",))
    (language,) = tried(capsys, "hf:org/llama@v2", "--as", "language")
    assert language["verdict"] == "works" and "source: hf:org/llama@v2" in language["yaml"]
    (row,) = tried(capsys, "hf:org/llama@main", "--as", "language", code=2)
    assert "`hf download org/llama --revision main`" in row["message"]


def test_a_difference_is_told_and_does_not_work(
    clip_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = EncoderMap.forward
    monkeypatch.setattr(EncoderMap, "forward", lambda self, pixels: own(self, pixels) * 1.001)
    (expert,) = tried(capsys, clip_folder, "--as", "expert", code=2)
    assert expert["verdict"] == "differs" and not expert["comparisons"][0]["equal"]
    assert 1e-4 < expert["comparisons"][0]["difference"] < 0.1 and "yaml" not in expert


def test_an_expert_that_draws_random_numbers_does_not_work(
    clip_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = EncoderMap.forward
    monkeypatch.setattr(EncoderMap, "forward", lambda self, pixels: own(self, pixels) + 1e-7 * torch.empty(1).cauchy_())
    (expert,) = tried(capsys, clip_folder, "--as", "expert", code=2)
    assert expert["verdict"] == "differs" and expert["facts"]["deterministic"] == "no"


def test_what_nobody_foresaw_is_a_row_with_its_type(
    clip_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no such family\nsecond line")

    monkeypatch.setattr(ClipEncoder, "load_weights", broken)
    expert, clip, _ = tried(capsys, clip_folder)
    assert expert["verdict"] == "works"
    assert (clip["verdict"], clip["message"]) == ("error", "ZeroDivisionError: no such family")
    monkeypatch.setattr(roles, "encoder_arguments", broken)
    (clip,) = tried(capsys, clip_folder, "--as", "encoder", code=2)
    assert (clip["verdict"], clip["class"]) == ("error", "")


def test_names_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    expert, encoder, language = tried(capsys, "test_vit", "--weights", "random")
    assert (expert["verdict"], expert["class"]) == ("works", "TimmExpert")
    assert expert["comparisons"][0]["reference"].startswith("timm: ") and expert["comparisons"][0]["equal"]
    assert (encoder["verdict"], encoder["class"], language["verdict"]) == ("works", "TimmEncoder", "refused")
    (convnet,) = tried(capsys, "test_convnext", "--weights", "random", "--as", "encoder", code=2)
    assert convnet["verdict"] == "refused" and "test_convnext" in convnet["message"]
    (unnamed,) = tried(capsys, "ViT-B-16", "--as", "expert", code=2)
    assert "--weights TAG" in unnamed["message"] and "laion2b_s34b_b88k" in unnamed["message"]


@pytest.mark.parametrize("role", ["expert", "encoder", "language"])
def test_what_is_nowhere_says_what_fetches_it(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = tried(capsys, "org/nothing", "--as", role, code=2)
    assert row["verdict"] == "refused" and "`hf download org/nothing" in row["message"]


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("siglip", "transformers: encoder.layers.1"),
        ("timm", "timm: blocks, tokens 1 to 4 of 5"),
        ("open_clip", "open_clip: trunk.blocks.7, tokens 1 to 100 of 101"),
    ],
)
def test_an_encoder_of_any_family_is_held_against_its_library(
    kind: str, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = ("--layer", -1) if kind == "timm" else ()
    (row,) = tried(capsys, folder(kind, tmp_path), "--as", "encoder", *layer)
    (compared,) = row["comparisons"]
    assert (row["verdict"], row["class"], compared["reference"]) == ("works", CLASSES[kind].__name__, reference)
    assert compared["difference"] < 1e-5 < compared["scale"]
    written = yaml.safe_load(row["yaml"])["model"]["init_args"]["clip"]
    assert written["class_path"] == f"visexpert.vision.{CLASSES[kind].__name__}"


def test_weights_alone_are_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "epoch_3.pt")
    expert, clip, language = tried(capsys, tmp_path / "epoch_3.pt", code=2)
    assert "--weights FILE" in expert["message"]
    assert {row["verdict"] for row in (expert, clip, language)} == {"refused"}


def test_the_printed_form(clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["try", "zoo:depth", "--as", "expert"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "expert: works, TinyExpert" and "  grid: 12 x 12 = 144 tokens" in lines
    assert any(line.startswith("  not compared: ") for line in lines) and "          depth:" in lines
    with pytest.raises(SystemExit) as caught:
        main(["try", "--help"])
    assert caught.value.code == 0 and "docs/families.md" in capsys.readouterr().out


def test_a_language_model_without_a_tokenizer_says_so(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = tried(capsys, llama_folder, "--as", "language")
    assert row["facts"]["tokenizer"].startswith("none")


def test_an_empty_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["try", " "])
    assert "MODEL is empty" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["expert", "encoder"])
def test_a_misspelled_name_is_told_the_nearest(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = tried(capsys, "resnet51", "--as", role, code=2)
    assert row["verdict"] == "refused"
    assert "'resnet50'" in row["message"]


def changed(folder: Path, to: Path, *, weights: Any = None, **files: dict[str, Any]) -> Path:
    """Copy a model, and change weights or entries of its JSON files."""
    shutil.copytree(folder, to)
    if weights is not None:
        state = load_file(to / "model.safetensors")
        save_file(dict(weights(key, value) for key, value in state.items()), to / "model.safetensors", {"format": "pt"})
    for name, entries in files.items():
        path = to / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    return to


def test_weights_of_a_compiled_model_are_held_against_the_same_weights(
    clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = changed(clip_folder, tmp_path / "c", weights=lambda key, value: (f"_orig_mod.{key}", value))
    (clip,) = tried(capsys, compiled, "--as", "encoder")
    assert clip["verdict"] == "works" and clip["comparisons"][0]["equal"], clip
    trained = changed(clip_folder, tmp_path / "t", weights=lambda key, value: (f"student.{key}", value))
    (clip,) = tried(capsys, trained, "--as", "encoder")
    assert clip["verdict"] == "works" and not clip["comparisons"] and "transformers" in clip["facts"]["not compared"]


@pytest.mark.parametrize("role", ["expert", "encoder"])
def test_numbers_that_spoil_every_token_are_named(
    role: str, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = "vision_model.encoder.layers.0.mlp.fc1.bias"
    nan = changed(clip_folder, tmp_path / "nan", weights=lambda k, v: (k, v * float("nan") if k == spoilt else v))
    (row,) = tried(capsys, nan, "--as", role, code=2)
    assert row["verdict"] == "refused" and "NaN" in row["message"] and "layers.0.mlp.fc1.bias" in row["message"]
    for name, entries in (("std", {"image_std": [0.0, 0.5, 0.5]}), ("mean", {"image_mean": [0.5, 0.5]})):
        (row,) = tried(capsys, changed(clip_folder, tmp_path / name, preprocessor_config=entries), "--as", role, code=2)
        assert row["verdict"] == "refused" and f"{name}=" in row["message"]
        assert str(next(iter(entries.values()))) in row["message"].replace("(", "[").replace(")", "]")


@pytest.mark.parametrize("role", ["expert", "encoder"])
def test_a_field_that_its_configuration_cannot_take_is_named(
    role: str, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = json.loads((clip_folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    for name, value in (("hidden_size", None), ("num_attention_heads", 0)):
        config = {"vision_config": {**vision, name: value}}
        (row,) = tried(capsys, changed(clip_folder, tmp_path / name, config=config), "--as", role, code=2)
        assert row["verdict"] == "refused", row
