"""From a folder of a library to a trained one: fit, test, fold or merge, export natively, reload by that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from tests.tiny_encoders import WRITERS
from visexpert.cli import main
from visexpert.commands.export_mole import sources_of
from visexpert.export import Treatment
from visexpert.runs import load_run
from visexpert.vision import VisionEncoder, equipped_blocks

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL = "--model.init_args."
CLIP = f"{MODEL}clip.init_args."
SMALL: dict[str, object] = {"num_train": 8, "num_val": 4, "num_test": 4, "batch_size": 4, "eval_batch_size": 4}
SHORT = [f"--data.init_args.{name}={value}" for name, value in SMALL.items()]
SHORT += ["--data.init_args.rendering.workers=1", f"{MODEL}optimizer.warmup_steps=1", "--trainer.accelerator=cpu"]
SHORT += [f"--trainer.{name}=2" for name in ("max_steps", "val_check_interval", "log_every_n_steps")]


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.getbasetemp() / "families-cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setattr("visexpert.metrics.java.has_java", lambda: False)


def by_transformers(folder: Path, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last hidden state before the norm, and the pooled output."""
    model = AutoModel.from_pretrained(folder).eval()
    found = model(pixels, output_hidden_states=True)
    return found.hidden_states[-1], found.pooler_output


def by_timm(folder: Path, pixels: Tensor) -> tuple[Tensor, Tensor]:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    given = {"norm": False, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
    ((patches, prefix),) = model.forward_intermediates(pixels, indices=1, **given)
    return torch.cat([prefix, patches], dim=1), model.forward_head(model.forward_features(pixels), pre_logits=True)


def must_agree(encoder: VisionEncoder, folder: Path) -> None:
    """Hold tokens and pooled output of an exported folder, read by its own library, against an encoder's."""
    images = torch.rand(3, 3, 80, 64, generator=torch.Generator().manual_seed(0))
    read = by_timm if (folder / "config.json").read_text().count('"architecture"') else by_transformers
    with torch.no_grad():
        hidden_BND, pooled_BP = read(folder, encoder.preprocess(images))
        ours_BTD, theirs_BTD = encoder(images).tokens_BTD, hidden_BND[:, encoder.prefix :]
        assert float(F.cosine_similarity(ours_BTD, theirs_BTD, dim=-1).min()) >= 0.9999
        assert float(F.cosine_similarity(encoder.pooled(images), pooled_BP, dim=-1).min()) >= 0.9999


@pytest.mark.parametrize(("kind", "treatment"), [("clip", None), ("siglip", "flatten"), ("timm", "fold")])
def test_a_family_goes_in_and_comes_out_taught(
    kind: str, treatment: Treatment | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    given = ["--config", str(CONFIGS / "distill" / "tabletop.yaml"), "--run", str(run), *SHORT]
    if kind != "clip":
        (tmp_path / "in").mkdir()
        WRITERS[kind](tmp_path / "in")
        given[2:2] = ["--config", str(CONFIGS / "distill" / f"{kind}.yaml")]
        given += [f"{CLIP}source={tmp_path / 'in'}", f"{CLIP}mole={{num_experts: 2, rank: 2}}"]
    main(["fit", *given])
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert any(name.startswith("test/") for name in metrics)

    saved = load_run(run)
    encoder = saved.model.clip
    start = encoder.rebuilt()
    start.load_weights()
    moved = {
        key
        for key, value in start.model.state_dict().items()
        if not torch.equal(encoder.model.state_dict()[key], value)
    }
    assert any("mlp" in key for key in moved)
    mole = []
    if treatment is not None:
        assert equipped_blocks(encoder)
        mole = ["--mole", "flatten", "--steps", "2"] if treatment == "flatten" else []  # a fold is the default
        torch.manual_seed(0)
        sources = sources_of(
            saved,
            ["native"],
            layers=None,
            treatment=treatment,
            flatten=(2, 1e-4),
        )
        encoder = sources["native"].clip
    capsys.readouterr()
    torch.manual_seed(0)
    main(["export", str(run), "--format", "native", "--out", str(out), *mole])
    assert ("one plain encoder" in capsys.readouterr().out) is (treatment is not None)
    facts = json.loads((out / "fidelity.json").read_text(encoding="utf-8"))
    assert facts["layers"]["-1"]["min_cosine"] >= 0.9999 and facts["pooled"]["min_cosine"] >= 0.9999
    must_agree(encoder, out)


def test_experts_merged_into_another_family_come_out_with_it(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    (tmp_path / "in").mkdir()
    WRITERS["siglip"](tmp_path / "in")
    over = ["tove/smoke.yaml", "distill/siglip.yaml", "tove/smoke-merge.yaml"]
    given = [part for name in over for part in ("--config", str(CONFIGS / name))]
    main(["fit", *given, "--run", str(run), f"{CLIP}source={tmp_path / 'in'}", *SHORT])
    encoder = load_run(run / "merged").model.clip
    before = load_file(tmp_path / "in" / "model.safetensors")
    main(["export", str(run), "--out", str(out)])
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    must_agree(encoder, out)
