"""A student with MoLE: kept exactly where the format can, refused where not, and what a plain CLIP loses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from transformers import AutoModel

from tests.export.helpers import tiny_clip, tiny_source
from visexpert.errors import ConfigError
from visexpert.export import FORMATS, KEEP_MOLE, ExportSource, MoLEReport, differences, export
from visexpert.export.fidelity import check_inputs
from visexpert.export.report import mole_lines, write_reports
from visexpert.export.verify import UNDECIDED, Fidelity, _decided
from visexpert.vision import ClipEncoder, MoLESettings, add_mole, equipped_blocks, fold, mole_settings
from visexpert.vision.mole_inference import UsageMeter


def student(**settings: Any) -> ClipEncoder:
    """The tiny CLIP of the other tests with MoLE far from its start."""
    torch.manual_seed(3)
    clip = tiny_clip()
    add_mole(clip, **{"num_experts": 3, "rank": 4, "dropout": 0.1, **settings})
    for mole in equipped_blocks(clip).values():
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    return clip.requires_grad_(False).eval()


def source_of(clip: ClipEncoder) -> ExportSource:
    settings = mole_settings(clip)
    assert settings is not None
    return replace(tiny_source(), clip=clip, mole=MoLEReport("exact", settings))


@pytest.mark.usefixtures("read_afresh")
def test_the_student_comes_back_exactly(tmp_path: Path) -> None:
    clip = student()
    with torch.no_grad():
        equipped_blocks(clip)[1].router.bias[2] = -100.0  # an expert that gets no token
    names = ("onnx", "torch_export", "visexpert")
    assert names == KEEP_MOLE
    source = source_of(clip)
    export({name: source for name in ("onnx", "visexpert")}, tmp_path / "out")
    for name in ("onnx", "visexpert"):
        folder = tmp_path / "out" / name
        facts = json.loads((folder / "fidelity.json").read_text(encoding="utf-8"))
        assert all(entry["relative"] < 2e-5 for entry in [*facts["layers"].values(), facts["pooled"]])
        assert facts["mole"]["treatment"] == "exact" and facts["mole"]["student"]["layers"] == [0, 1]
        assert "## MoLE: exact" in (folder / "fidelity.md").read_text(encoding="utf-8")
        assert "MoLE (exact)" in (folder / "README.md").read_text(encoding="utf-8")
    native, graph = (json.loads((tmp_path / "out" / n / "fidelity.json").read_text()) for n in ("visexpert", "onnx"))
    assert native["parameters"] == sum(p.numel() for p in clip.model.parameters())
    mlp = 2 * 16 * 40 + 16 + 40  # in the graph, a plain MLP and no low ranks for each of three experts in two layers
    plain = sum(p.numel() for p in tiny_clip().model.parameters())
    assert graph["parameters"] == plain + 2 * (2 * mlp + 3 * 16 + 3)
    assert native["reload"]["not_importable"] == [] and native["preprocessing"]["difference_in_levels_of_255"]


def test_the_native_folder_is_no_model_of_transformers(tmp_path: Path) -> None:
    clip = student(routing="dense")
    FORMATS["visexpert"].write(source_of(clip), tmp_path)
    settings = MoLESettings(**json.loads((tmp_path / "mole.json").read_text(encoding="utf-8")))
    again = ClipEncoder(source=str(tmp_path), mole=settings).eval()
    again.load_weights()
    images = torch.rand(2, 3, 40, 32)
    assert torch.equal(again(images).tokens_BTD, clip(images).tokens_BTD)
    with pytest.raises((ValueError, KeyError), match="visexpert_clip_mole"):
        AutoModel.from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    "settings", [{"routing": "dense"}, {"router": "scaled"}, {"router": "straight_through"}, {"num_experts": 1}]
)
def test_every_routing_becomes_a_graph(settings: dict[str, Any], tmp_path: Path) -> None:
    clip = student(**settings)
    source = source_of(clip)
    FORMATS["torch_export"].write(source, tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    as_onnx = settings.get("router") == "scaled"  # the one with most of its own operations, for time's sake
    if as_onnx:
        FORMATS["onnx"].write(source, tmp_path)
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = clip.model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            got = program(pixels)["patch_tokens"]
        scale = float(expected.square().mean().sqrt())
        assert float((got - expected).abs().max()) < 2e-5 * scale
        if as_onnx:
            session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
            (tokens,) = session.run(["patch_tokens"], {"pixel_values": pixels.numpy()})
            assert float((torch.from_numpy(tokens) - expected).abs().max()) < 2e-5 * scale


def test_what_has_no_place_for_mole_is_refused(tmp_path: Path) -> None:
    for name in set(FORMATS) - set(KEEP_MOLE):
        with pytest.raises(ConfigError, match=rf"{name} .*--mole fold.* or use one of onnx"):
            export({name: source_of(student())}, tmp_path / "out")
    with pytest.raises(ConfigError, match="none, use the format hf"):
        export({"visexpert": tiny_source()}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_images_on_which_rounding_decides_are_left_out() -> None:
    clip = student()
    images = check_inputs(clip.image_size).images_BCHW
    assert _decided(tiny_clip(), images).tolist() == list(range(len(images)))
    assert set(_decided(clip, images).tolist()) <= set(range(len(images)))
    router = equipped_blocks(clip)[1].router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, UNDECIDED / 2, -1.0]))  # no clear choice for any token of any image
    assert len(_decided(clip, images)) == 1


def test_a_fold_says_what_it_loses(tmp_path: Path) -> None:
    clip = student()
    images = check_inputs(clip.image_size).images_BCHW
    meter = UsageMeter(clip)
    meter.update(images)
    usage, settings = meter.usage(), mole_settings(clip)
    plain = fold(clip, usage)
    assert settings is not None
    lost = differences(clip, plain, (-2, -1))
    error = {"nmse": 0.5, "relative": 0.25, "mean_cosine": 0.75, "min_cosine": 0.125, "num_images": 8}
    later = error | {"nmse": 0.0625}
    mole = MoLEReport("flatten", settings, usage, lost, {"fold": error, "flatten": later}, steps=7)
    entry = dict.fromkeys(("max_abs", "mean_abs", "relative"), 0.0) | dict.fromkeys(("min_cosine", "mean_cosine"), 1.0)
    shown = Fidelity(dict.fromkeys(("layer_minus_2", "layer_minus_1", "pooled"), entry), {}, 1e-4, {}, num_images=7)
    write_reports(replace(tiny_source(), clip=plain, mole=mole), "hf", FORMATS["hf"], shown, tmp_path)
    facts = json.loads((tmp_path / "fidelity.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        pixels = clip.preprocess(images)
        both = [model.model(pixels, output_hidden_states=True).hidden_states[-2] for model in (clip, plain)]
    expected = float((both[1] - both[0]).abs().max() / both[0].square().mean().sqrt())
    found = facts["mole"]["against_student_on_check_images"]["layer_minus_2"]
    assert found["relative"] == pytest.approx(expected, rel=1e-4) and expected > 0.05
    assert facts["mole"]["steps"] == 7 and facts["mole"]["usage"]["validation_images"] == 8
    text = (tmp_path / "fidelity.md").read_text(encoding="utf-8")
    assert " 1 of them were left out of the comparison" in text
    assert "| fold | 8 | 5.00e-01 | 2.50e-01 | 0.7500 | 0.1250 |" in text
    assert "| flatten, 7 steps | 8 | 6.25e-02 |" in text
    assert "It is not the student" in text and "It is not the student" in (tmp_path / "README.md").read_text()
    shares = usage.gates[1].tolist()
    assert "| block 1 | " + " | ".join(f"{share:.3f}" for share in shares) + " |" in text


def test_an_exact_export_has_no_table_of_losses() -> None:
    settings = MoLESettings(num_experts=2, rank=5, layers=[0, 4])
    text = "\n".join(mole_lines(MoLEReport("exact", settings).facts(), [-2]))
    assert "2 low-rank experts of rank 5 (routing top1, router released) in blocks 0, 4." in text and "|" not in text
