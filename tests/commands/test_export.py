"""``visexpert export``: which CLIP of a run it exports, what it reports, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visexpert.captioning import Captioner, text_encoder_of
from visexpert.cli import main
from visexpert.commands import export as command
from visexpert.commands.export import run_with_clip
from visexpert.commands.export_source import source_of
from visexpert.errors import ConfigError
from visexpert.export import FORMATS, TOLERANCE, Dtype, Projection, Treatment
from visexpert.export.llava import QUESTION
from visexpert.language import Decoding
from visexpert.runs import build, load_run

SMOKE = Path(__file__).parents[2] / "configs" / "tove" / "smoke.yaml"
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PREFIX: dict[str, Any] = {
    "class_path": "visexpert.language.PrefixLM",
    "init_args": {
        "config": {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    },
}
TALKATIVE: dict[str, Any] = PREFIX | {
    "init_args": {"config": PREFIX["init_args"]["config"] | {"tie_word_embeddings": False, "initializer_range": 0.5}}
}
"""Weights so wide that it does not say one word all the time."""

LLAVA: dict[str, Any] = {"language": PREFIX, "projector": {"kind": "mlp2x_gelu", "norm": False}}


def write_run(
    folder: Path,
    *,
    trained: bool = True,
    clip: Mapping[str, Any] | None = None,
    encoder: str = "ClipEncoder",
    **settings: Any,
) -> Path:
    """Write a run's folder as training would leave it, with random weights.

    Args:
        folder: Folder to write.
        trained: Whether CLIP trained, so that the checkpoint holds it.
        clip: Settings of CLIP in place of the smoke configuration's.
        encoder: Class of CLIP.
        settings: Settings of ToVE.
    """
    config = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    arguments = config["model"]["init_args"]
    arguments.update({"use": [], "optimizer": {"clip_lr": 1e-3 if trained else 0.0}} | settings)
    if clip is not None:
        arguments["clip"] = {"class_path": f"visexpert.vision.{encoder}", "init_args": dict(clip)}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    model, _ = build(config, folder / "config.yaml")
    if clip is not None:
        model.get_submodule("clip").load_weights()  # type: ignore[operator]
    kept = {key: value for key, value in model.state_dict().items() if trained or not key.startswith("clip.")}
    checkpoint = {"state_dict": kept, "global_step": 7, "epoch": 0, "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["export", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("visexpert: ") and said.count("\n") == 1
    return said


def test_a_merged_run_becomes_a_llava_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", trained=False)
    torch.manual_seed(0)
    merged = write_run(run / "merged", **LLAVA | {"language": TALKATIVE})
    facts = {"experts": {"depth": "CC-BY-NC-4.0"}, "clip_license": "MIT", "steps": 5, "distance": "mse"}
    (merged / "merge.json").write_text(json.dumps(facts), encoding="utf-8")
    main(["export", str(run), "--format", "llava", "--out", str(tmp_path / "out")])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    said = capsys.readouterr().out
    assert said.startswith(f"llava: {tmp_path / 'out'} (largest error after reloading ")
    assert str(tmp_path / "out" / "README.md") in said
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert report["licenses"] == {"clip": "MIT", "expert depth": "CC-BY-NC-4.0"}
    assert report["origin"]["run"] == "run/merged" and report["origin"]["merge: distance"] == "mse"
    assert report["layer_read"] == -2 and set(report["layers"]) == {"-2", "-1"}
    assert report["logits"]["relative"] < 1e-5
    readme_answers_as_caption_does(merged, tmp_path / "out")


def readme_answers_as_caption_does(run: Path, out: Path) -> None:
    """Execute the code of an exported LLaVA's README, and ask the run the same question."""
    saved = load_run(run)
    model: Any = saved.model
    side = model.clip.image_size
    pixels_HW3 = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels_HW3.numpy()).save(out / "photo.jpg", format="PNG")  # without loss
    found: dict[str, Any] = {}
    readme = (out / "README.md").read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(readme.split("```python\n")[1].split("```")[0], found)
    captioner = Captioner(saved, device="cpu")
    assert captioner.side == side
    written: list[list[int]] = []
    generate = model.language.generate

    def kept(*given: Any, **settings: Any) -> Any:
        written.extend(generate(*given, **settings))
        return written

    model.language.generate = kept
    picture = captioner.frame(pixels_HW3.permute(2, 0, 1))
    (answer,) = captioner.answer([picture], QUESTION, decoding=Decoding(max_new_tokens=32))
    assert written[0] == found["ids"][0].tolist()[: len(written[0])] and len(set(written[0])) > 1
    assert answer.text == found["answer"]
    assert found["prompt"] == text_encoder_of(saved).prompt_text(QUESTION) and f"```text\n{found['prompt']}\n" in readme


def test_a_run_without_a_trained_clip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", trained=False)
    out = ["--format", "hf", "--out", str(tmp_path / "out")]
    assert f"run `visexpert merge {run}` first" in refusal([str(run), *out], capsys)
    (run / "merged").mkdir()
    assert f"'{run / 'merged'}' is not finished; run `visexpert merge {run}` again" in refusal([str(run), *out], capsys)
    assert "is not a run" in refusal([str(tmp_path), *out], capsys)
    assert "is not a run" in refusal([str(tmp_path / "absent"), *out], capsys)
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    absent, out = str(tmp_path / "absent"), ["--out", str(tmp_path / "out")]
    assert "is not empty" in refusal([absent, "--format", "hf", "--out", str(tmp_path / "full")], capsys)
    unknown = refusal([absent, "--format", "hf,coreml", *out], capsys)
    assert "'coreml' is unknown; use one of native, hf, open_clip" in unknown
    onnx = [absent, "--format", "hf,onnx", *out, "--dtype", "float16"]
    assert "onnx stores float32 weights only; leave out dtype float16" in refusal(onnx, capsys)
    assert "must be above 0" in refusal([absent, "--format", "hf", *out, "--tolerance", "0"], capsys)


def test_the_dtype_reaches_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("visexpert.export.export", lambda sources, *_, **__: given.update(sources) or {})
    run, out = write_run(tmp_path / "run"), ["--out", str(tmp_path / "out")]
    for wanted, dtype in ((["--dtype", "bfloat16"], torch.bfloat16), ([], None)):
        main(["export", str(run), "--format", "hf,open_clip", *wanted, *out])
        assert [source.dtype for source in given.values()] == [dtype, dtype]


def test_the_folder_that_is_opened(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tuned")
    assert run_with_clip(run) == run
    merged = write_run(run / "merged")
    assert run_with_clip(run) == merged and run_with_clip(merged) == merged


@pytest.mark.parametrize("layers", [[-4], [0], [-1, 3]])
def test_layers_that_the_clip_lacks_are_refused(layers: list[int], tmp_path: Path) -> None:
    saved = load_run(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"--layers .* is outside -3..-1 of an encoder with 2 layers"):
        source_of(saved, layers, with_language=False)


def test_layers_that_timm_does_not_return_are_refused(tmp_path: Path) -> None:
    small = {"model": "vit_tiny_patch16_224", "image_size": 32, "arguments": {"depth": 2}}
    saved = load_run(write_run(tmp_path / "run", clip=small, encoder="TimmEncoder"))
    with pytest.raises(ConfigError, match=r"--layers -3 is outside -2..-1 of an encoder with 2 layers"):
        source_of(saved, [-3], with_language=False)


def test_licenses_without_a_merge_are_those_of_the_experts_in_use(tmp_path: Path) -> None:
    source = source_of(load_run(write_run(tmp_path / "run", use=["depth"])), None, with_language=False)
    assert source.licenses == {"clip": "not stated", "expert depth": "Apache-2.0"}
    assert source.layers == (-2, -1) and source.pooled_trained is None


@pytest.mark.parametrize(
    ("changed", "trained"), [("encoder.layers.0.mlp.fc1.bias", False), ("post_layernorm.bias", True)]
)
def test_whether_the_pooled_output_was_trained_is_read_from_the_weights(
    changed: str, trained: bool, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    CLIPVisionModel(CLIPVisionConfig(**fields, image_size=32, patch_size=8)).save_pretrained(tmp_path / "clip")
    run = write_run(tmp_path / "run", clip={"source": str(tmp_path / "clip"), "license": "MIT"})
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"][f"clip.model.{changed}"] += 0.1
    torch.save(checkpoint, path)
    source = source_of(load_run(run), None, with_language=False)
    assert source.pooled_trained is trained and source.licenses == {"clip": "MIT"}


def test_the_projection_that_stays_behind_is_told(tmp_path: Path) -> None:
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    config = CLIPConfig(vision_config=vision, text_config=text | {"bos_token_id": 0, "eos_token_id": 1})
    config.projection_dim = 12
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    run = write_run(tmp_path / "run", clip={"source": str(tmp_path / "clip")})
    source = source_of(load_run(run), None, with_language=False)
    assert source.projection == Projection(12, str(tmp_path / "clip"))
    FORMATS["hf"].write(source, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["projection_dim"] == 12


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "language: CrossAttentionDecoder"),
        (
            LLAVA | {"language": PREFIX | {"init_args": PREFIX["init_args"] | {"position_scale": 0.7}}},
            "position_scale: 0.7",
        ),
        (LLAVA | {"projector": {"kind": "linear", "norm": False}}, "a projector other than mlp2x_gelu"),
        (LLAVA | {"projector": {"kind": "mlp2x_gelu", "norm": True}}, "projector.norm: true"),
        (LLAVA | {"use": ["depth"]}, r"use: \['depth'\]"),
        (LLAVA | {"blind": True}, "blind: true"),
    ],
)
def test_what_llava_has_no_place_for_is_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    saved = load_run(write_run(tmp_path / "run", **settings))
    with pytest.raises(ConfigError, match=f"--format llava .*{named}"):
        source_of(saved, None, with_language=True)


def test_help_says_what_the_room_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.NAMES == tuple(FORMATS)
    options = command.parser().parse_args(["run", "--format", "hf", "--out", "x", "--layers", "-2", "-1"])
    assert command.MOLE == get_args(Treatment) and command.DTYPES == get_args(Dtype)
    assert options.tolerance == TOLERANCE and options.layers == [-2, -1]


@pytest.mark.parametrize("kind", ["siglip", "timm"])
def test_a_run_with_another_encoder_is_written_as_its_library_does(kind: str, tmp_path: Path) -> None:
    if kind == "siglip":
        encoder: Any = SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32, patch_size=8))
        encoder.save_pretrained(tmp_path / "in")
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "in")
    else:
        small: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **small)
        timm.models.save_for_hf(encoder, str(tmp_path / "in"), safe_serialization=True)
    name = {"siglip": "TransformersEncoder", "timm": "TimmEncoder"}[kind]
    run = write_run(tmp_path / "run", clip={"source": str(tmp_path / "in")}, encoder=name)
    main(["export", str(run), "--out", str(tmp_path / "out")])
    facts = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert facts["format"] == "native" and facts["encoder"] == name and facts["pooled_trained"] is False
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "in"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
