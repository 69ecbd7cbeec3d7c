"""Parts from Python: read on first use, images checked, short to print, opened by load_run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visexpert as vx
from tests.methods.helpers import noise_batch, tiny_tove
from visexpert.experts import hub as hub_module

IMAGES = torch.rand(2, 3, 64, 64)


def tokens_of(given: Any) -> Tensor:
    return given.tokens_BTD if hasattr(given, "tokens_BTD") else given.tokens_BSE  # type: ignore[no-any-return]


MAKERS: dict[str, Callable[[], Any]] = {
    "encoder": lambda: vx.ClipEncoder(source="zoo:clip"),
    "expert": lambda: vx.TinyExpert(source="zoo:edges"),
}


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_a_part_reads_its_weights_when_it_is_first_called(kind: str) -> None:
    fresh, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    assert "not read yet" in repr(fresh) and "not read yet" not in repr(loaded)
    assert not fresh.weights_in_place and loaded.weights_in_place
    assert torch.equal(tokens_of(fresh(IMAGES)), tokens_of(loaded(IMAGES)))
    assert fresh.weights_in_place and fresh.fingerprint() == MAKERS[kind]().fingerprint()


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_weights_that_were_put_in_otherwise_are_kept(kind: str) -> None:
    part, other = MAKERS[kind](), MAKERS[kind]()
    other.load_weights()
    for parameter in other.parameters():
        parameter.add_(0.01)
    part.load_state_dict(other.state_dict())
    assert torch.equal(tokens_of(part(IMAGES)), tokens_of(other(IMAGES)))
    twin = copy.deepcopy(other)
    assert torch.equal(tokens_of(twin(IMAGES)), tokens_of(other(IMAGES)))


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_a_state_without_a_parts_weights_leaves_them_to_be_read(kind: str) -> None:
    """As a checkpoint leaves frozen parts out."""
    part, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    whole = torch.nn.ModuleDict({"part": part, "head": torch.nn.Linear(2, 2)})
    whole.load_state_dict({f"head.{key}": value for key, value in whole["head"].state_dict().items()}, strict=False)
    assert not part.weights_in_place
    assert torch.equal(tokens_of(part(IMAGES)), tokens_of(loaded(IMAGES)))


def test_weights_that_are_nowhere_are_told_at_the_first_call() -> None:
    missing = vx.ClipEncoder(source="openai/clip-vit-base-patch16", architecture="ViT-B-16-quickgelu")
    with pytest.raises(vx.WeightsError, match="openai/clip-vit-base-patch16"):
        missing(IMAGES)


@torch.no_grad()
def test_an_expert_that_is_attached_later_is_read_then(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = vx.ExpertHub({"edges": vx.TinyExpert(source="zoo:edges")}, detached=["edges"])
    experts.load_weights()
    assert not experts["edges"].weights_in_place and "detached" in repr(experts)
    checked: list[str] = []
    monkeypatch.setattr(hub_module, "check_repeats", lambda expert, name: checked.append(name))
    experts.attach("edges")
    found = experts(vx.Batch(IMAGES, torch.arange(2), ""))["edges"].tokens_BSE
    assert checked == ["edges"] and torch.equal(found, vx.TinyExpert(source="zoo:edges")(IMAGES).tokens_BSE)


@torch.no_grad()
def test_a_language_model_is_read_before_it_writes() -> None:
    settings: dict[str, Any] = {"vocab_size": 96, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2}
    language = vx.CrossAttentionDecoder(**settings, position_scale=0.7, source="zoo:language.safetensors")
    loaded = vx.CrossAttentionDecoder(**settings, position_scale=0.7, source="zoo:language.safetensors")
    loaded.load_weights()
    vision = vx.ClipEncoder(source="zoo:clip")(IMAGES)
    vision = replace(vision, tokens_BTD=vision.tokens_BTD[..., :64])
    asked: Any = {"prompts": [[1, 7], [1, 8]], "eos_id": 2, "max_new_tokens": 4}
    assert language.generate(vision, **asked) == loaded.generate(vision, **asked)


WRONG = {
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    "0 to 255": (torch.full((1, 3, 8, 8), 200.0), "200"),
    "normalized": (torch.randn(1, 3, 8, 8) - 3, r"\[0, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), torch.nan), "nan"),
    "no batch": (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
    "channels last": (torch.rand(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_images_are_refused_by_what_they_are(kind: str) -> None:
    images, words = WRONG[kind]
    model = tiny_tove()
    for entry in (model.clip, model.hub["semantic"]):
        with pytest.raises(vx.DataError, match=words):
            entry(images)
    if images.is_floating_point() and kind != "no batch":
        with pytest.raises(vx.DataError, match=words):
            model.encode(vx.Batch(images, torch.arange(1), ""))


def test_a_training_step_trusts_what_the_data_give() -> None:
    """A look at the values would wait for the device; see tests/methods/test_waits.py."""
    batch = noise_batch()
    assert tiny_tove().step(replace(batch, images_BCHW=batch.images_BCHW.float() * 2)).loss.isfinite()


def test_what_is_printed_is_short() -> None:
    model = tiny_tove(detached=["depth"])
    lines = repr(model).splitlines()
    assert len(lines) <= 12 and lines[0] == "ToVE(" and max(map(len, lines)) < 160
    assert any("depth: detached" in line for line in lines) and any(
        "ClipEncoder(random, layer -2" in line for line in lines
    )
    assert len(repr(noise_batch())) < 500 and "uint8[2, 3, 20, 20]" in repr(noise_batch())


def test_a_checkpoint_alone_is_refused_with_what_opens_its_run() -> None:
    with pytest.raises(vx.ConfigError, match=r"visexpert\.load_run\('runs/tove'\)"):
        vx.ToVE.load_from_checkpoint(Path("runs/tove/checkpoints/last.ckpt"))
