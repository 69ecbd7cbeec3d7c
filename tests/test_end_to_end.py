"""Both methods from real file formats to an exported CLIP: fit, test, (merge,) export, caption, by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from tests.data.formats import write_jpeg
from tests.end_to_end_parts import Parts, write_captions, write_conversations, write_parts
from visexpert.cli import main

TRAINER = {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
SHARED = {"image_size": 32, "batch_size": 2, "eval_batch_size": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """The pretrained parts, and a cache and a run seed of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        yield write_parts(tmp_path_factory.mktemp("parts"))


def fit(folder: Path, model: Any, data: Any, tokenizer: str, **trainer: Any) -> Path:
    """Fit as a user would, from a YAML file; the run's folder."""
    data["init_args"] |= SHARED | {"tokenizer": tokenizer}
    config = {"seed_everything": 0, "model": model, "data": data, "trainer": TRAINER | trainer}
    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run = ["--run", str(folder / "run")]
    main(["fit", "--config", str(folder / "given.yaml"), *run, "--test_after_fit", "false"])
    return folder / "run"


def scores_of(run: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return scores


def scored(run: Path) -> dict[str, float]:
    """The scores that ``visexpert test`` adds to a run's own."""
    assert not any(name.startswith("test/") for name in scores_of(run))
    main(["test", str(run)])
    return {name: value for name, value in scores_of(run).items() if name.startswith("test/")}


def captioned(run: Path, image: Path, prompt: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["caption", str(run), str(image), "--prompt", prompt, "--max_new_tokens", "4", "--json"])
    (record,) = json.loads(capsys.readouterr().out)
    assert record["error"] is None and record["image"] == str(image)
    return str(record["text"])


def tokens_of(run: Path, image_BCHW: torch.Tensor) -> torch.Tensor:
    """What the CLIP of a run gives its language model, before the projector."""
    from visexpert.runs import load_run

    model: Any = load_run(run).model
    with torch.no_grad():
        tokens: torch.Tensor = model.clip(image_BCHW).tokens_BTD
    return tokens


def test_tove_from_coco_and_cc3m_to_a_merged_clip(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_captions(tmp_path)
    model = parts.model("ToVE", clip={"layer": -2}, language={})
    run = fit(tmp_path / "tove", model, data, parts.llama, max_steps=6)
    scores = scored(run)
    assert {"test/nll/nll", "test/caption/cider"} <= scores.keys()
    image = write_jpeg(tmp_path / "own.jpg", "green", size=(40, 30))
    captioned(run, image, "a picture of", capsys)
    quick = ["--steps", "2", "--optimizer.warmup_steps", "1", "--eval_every", "2", "--checkpoint_every", "2"]
    main(["merge", str(run), *quick])
    out = tmp_path / "out"
    main(["export", str(run), "--format", "hf", "--out", str(out)])
    clip = CLIPVisionModel.from_pretrained(out).eval()
    images_BCHW = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        found = clip((images_BCHW - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(found, tokens_of(run / "merged", images_BCHW), atol=1e-4, rtol=1e-4)
    captioned(run / "merged", image, "a picture of", capsys)


def test_movekd_from_llavas_conversations_to_a_llava(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mole = {"num_experts": 2, "rank": 2, "dropout": 0.0}
    forms: dict[str, Any] = {"heads": {"alignment": "to_student", "adapter": "released"}}
    forms["weighting"] = {"tokens": "attention", "teachers": "attention", "clip_teacher_weight": 0.8}
    aligned = write_conversations(tmp_path, style="plain", name="blip_laion_cc_sbu_558k.json")
    model = parts.model(
        "MoVEKD",
        clip={"mole": mole},
        language={},
        **forms,
        optimizer={"clip_lr": 0, "language_lr": 0, "warmup_steps": 1},
    )
    start = fit(tmp_path / "stage1", model, aligned, parts.llama) / "checkpoints" / "last.ckpt"
    kept = {key.split(".")[0] for key in torch.load(start, weights_only=True)["state_dict"]}
    assert not {"hub", "anchor"} & kept

    mixed = write_conversations(tmp_path, style="vicuna_v1", name="llava_v1_5_mix665k.json")
    mixed["init_args"].pop("val")  # as in configs/movekd/llava/stage2.yaml
    model = parts.model("MoVEKD", clip={"mole": mole}, language={}, **forms, init_from=str(start))
    run = fit(tmp_path / "stage2", model, mixed, parts.llama, max_steps=4)  # two epochs: text alone, too
    scores = scored(run)
    assert scores["test/nll/nll"] > 0 and any(name.startswith("test/pope") for name in scores)
    image = write_jpeg(tmp_path / "own.jpg", "green", size=(40, 30))
    captioned(run, image, "what is it?", capsys)
    out = tmp_path / "out"
    main(["export", str(run), "--format", "llava", "--out", str(out)])
    folded = json.loads((out / "fidelity.json").read_text(encoding="utf-8"))["mole"]
    assert folded["usage"]["images"] == "training" and folded["usage"]["training_images"] > 0
    assert folded["against_student_on_training_images"]["fold"]["nmse"] >= 0
    assert "training images, not" in (out / "fidelity.md").read_text(encoding="utf-8")
    state = LlavaForConditionalGeneration.from_pretrained(out).state_dict()
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state[HEAD], trained["projector.layers.2.weight"])
    assert AutoProcessor.from_pretrained(out).image_token == "<image>"


HEAD = "model.multi_modal_projector.linear_2.weight"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
