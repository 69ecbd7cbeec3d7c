"""``visexpert import``: released MoVE-KD files, in exactly their form, to a run that computes and writes the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.commands.released_model import MEAN, SIDE, STD, TEACHERS, TOKENS, TOWER, WIDTH, Release
from visexpert.cli import main
from visexpert.commands.import_weights import run
from visexpert.errors import ConfigError, WeightsError
from visexpert.methods import MoVEKD
from visexpert.runs import load_run
from visexpert.transfer import make_kd_head
from visexpert.transfer.kd_heads import Teacher
from visexpert.types import Batch, ExpertTokens

MOE = {
    "moe_encoder": True,
    "moe_encoder_dense": False,
    "moe_encoder_lora_rank": 4,
    "moe_encoder_lora_alpha": 1,
    "moe_encoder_num_experts": 3,
}


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path)


def imported(release: Release, folder: Path, *options: str) -> Path:
    out = release.root / "run"
    run([str(folder), "--clip", str(release.root / "clip"), "--out", str(out), "--dtype", "float32", *options])
    return out


def opened(out: Path) -> MoVEKD:
    model = load_run(out).model
    assert isinstance(model, MoVEKD)
    return model


@torch.no_grad()
def check_equal(model: MoVEKD, release: Release, *, dense: bool = False) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    pixels = (images - MEAN) / STD
    student = model.clip(images).tokens_BTD
    torch.testing.assert_close(student, release.tokens(pixels, dense=dense), atol=1e-4, rtol=1e-4)
    seen = model.encode(Batch(images, torch.arange(2), "test"))
    torch.testing.assert_close(seen.tokens_BTD, release.seen(pixels, dense=dense), atol=1e-3, rtol=1e-4)
    assert model.anchor is not None
    plain = model.anchor(images).tokens_BTD
    assert not torch.allclose(plain, student, atol=0.1)  # MoLE matters, and the teacher has none


def test_stage_1(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    folder = release.write_stage1()
    out = imported(release, folder, "--language", str(release.root / "vicuna"))
    told = capsys.readouterr().out
    assert re.search("'moe'.* 3 experts of rank 4.* 1 .*top-1.*--alpha.*--dense", told)
    assert "config.json has no 'kd' entry" in told
    assert (
        yaml.safe_load((out / "config.yaml").read_text())["model"]["init_args"]["clip"]["init_args"]["mole"]["layers"]
        == "all"
    )  # the release equips the block behind the tokens, too
    assert "sam: its adapter is left out. The released code scrambles" in told
    model = opened(out)
    check_equal(model, release)
    start, own = load_file(out / "start.safetensors"), model.state_dict()
    heads = {key.split(".")[2] for key in start if key.startswith("distillation.")}
    assert heads == {"eva", "convnext"}
    assert all(torch.equal(own[key], value) for key, value in start.items() if not key.startswith("distillation."))


def test_stage_2_captions_as_the_release_does(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    folder = release.write_stage2(moe=MOE, kd={"kd_mode": True})
    out = imported(release, folder)
    told = capsys.readouterr().out
    assert "'moe'" not in told and "'kd'" not in told
    model = opened(out)
    check_equal(model, release)
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kinds = {key.split(".")[0] for key in state}
    assert kinds == {"clip", "projector", "distillation"}  # no language model, no teacher
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
    image = release.root / "a.png"
    Image.fromarray(pixels.numpy()).save(image)
    main(["caption", str(out), str(image), "--prompt", "a red cube?", "--max_new_tokens", "8"])
    with torch.no_grad():
        wanted = release.write(pixels.permute(2, 0, 1) / 255, "a red cube?", length=8)
    line = capsys.readouterr().out.strip("\n")
    assert wanted and line == f"{image}: {wanted}"


def test_a_dense_release_in_one_torch_file_with_what_config_does_not_say(release: Release) -> None:
    out = imported(release, release.write_stage2(sharded=False), "--dense", "--alpha", "3")
    for key in [key for key in release.mole if ".lora_B." in key]:
        release.mole[key] *= 3  # the scale is alpha / rank, of weights and biases alike
    check_equal(opened(out), release, dense=True)


def test_adapters_fit_heads_of_a_training(release: Release) -> None:
    out = imported(release, release.write_stage1(), "--language", str(release.root / "vicuna"), "--keep_sam")
    state = load_file(out / "start.safetensors")
    for name, (channels, tokens) in TEACHERS.items():
        side = int(tokens**0.5)
        head = make_kd_head(name, _teacher(channels, side), clip_width=WIDTH, clip_grid=(4, 4), adapter="released")
        prefix = f"distillation.heads.{name}."
        head.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )
        tokens_BSE = torch.randn(2, tokens, channels)
        found = head.pair(torch.zeros(2, TOKENS, WIDTH), ExpertTokens(tokens_BSE, (side, side))).target_BTX
        torch.testing.assert_close(found, release.adapted(name, tokens_BSE), atol=1e-4, rtol=1e-4)


def _teacher(channels: int, side: int) -> Teacher:
    class Sizes:
        token_dim = channels
        grid_hw = (side, side)

    return Sizes()


def test_contradictions_are_refused_and_nothing_is_left(release: Release) -> None:
    folder = release.write_stage2(moe={**MOE, "moe_encoder_lora_rank": 32}, kd={})
    with pytest.raises(WeightsError, match="says moe_encoder_lora_rank=32, but the weights have 4"):
        imported(release, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "moe": MOE}), encoding="utf-8")
    with pytest.raises(ConfigError, match="--alpha 2 contradicts config.json, which says 1"):
        imported(release, folder, "--alpha", "2")
    with pytest.raises(ConfigError, match="--dense contradicts config.json"):
        imported(release, folder, "--dense")
    with pytest.raises(ConfigError, match="has a language model of its own; leave --language out"):
        imported(release, folder, "--language", "x")
    assert not (release.root / "run").exists()


def test_incomplete_and_foreign_files(release: Release) -> None:
    folder = release.write_stage1()
    vicuna = ("--language", str(release.root / "vicuna"))
    with pytest.raises(ConfigError, match="has no language model; name the one .* by --language"):
        imported(release, folder)
    router = f"{TOWER}encoder.layers.0.mlp.router.weight"
    torch.save({key: value for key, value in release.mole.items() if key != router}, folder / "mole_encoder.bin")
    with pytest.raises(WeightsError, match=r"missing \['encoder.layers.0.mlp.router.weight'\]"):
        imported(release, folder, *vicuna)
    gone = "layers.1.mlp.moe_up.1.lora_B."
    torch.save({key: value for key, value in release.mole.items() if gone not in key}, folder / "mole_encoder.bin")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.fc2_experts .*\[0, 2\]"):
        imported(release, folder, *vicuna)
    torch.save({"model.other.weight": torch.zeros(1)}, folder / "mole_encoder.bin")
    with pytest.raises(WeightsError, match="'model.other.weight' is not a name that MoVE-KD writes"):
        imported(release, folder, *vicuna)
    assert not (release.root / "run").exists()
    with pytest.raises(WeightsError, match=r"holds neither mm_projector.bin \(stage 1\) nor one of"):
        imported(release, release.root / "clip" / "nothing", *vicuna)
    with pytest.raises(ConfigError, match="is there already; name a new or empty folder"):
        run([str(folder), "--clip", "x", "--out", str(folder)])


def test_a_list_of_parts_stays_in_its_folder(release: Release) -> None:
    folder = release.write_stage2(moe=MOE)
    index = {"weight_map": {"lm_head.weight": "../vicuna/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WeightsError, match="which are not files beside it"):
        imported(release, folder)


def test_adapters_of_another_clip_are_refused(release: Release) -> None:
    release.adapters["eva_adapter_2.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError, match="adapter of eva gives 9 tokens of width 16, but this CLIP has 16 of 16"):
        imported(release, release.write_stage1(), "--language", str(release.root / "vicuna"))
    assert not (release.root / "run").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--help"])
    assert ended.value.code == 0 and "visexpert import MoVE-KD-7b-v1.1 --clip" in capsys.readouterr().out
