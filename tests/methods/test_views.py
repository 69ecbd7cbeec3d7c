"""Samples of text alone and images in tiles through each method: the language model reads what is there, no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts.helpers import MemoryImages
from tests.methods.helpers import CLIP_FIELDS, VOCAB, merging_of, noise_batch, shake, tiny_experts
from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.experts import VisionExpert
from visexpert.language import PrefixLM
from visexpert.losses import token_distance
from visexpert.methods import MergeStudent, Merging, Method, MoVEKD, ToVE
from visexpert.methods.settings import StoreSettings
from visexpert.methods.step import Seen
from visexpert.types import IMAGE_TOKEN, Batch
from visexpert.vision import ClipEncoder, MoLESettings, TiledClipEncoder

METHODS = ["tove", "movekd", "merging"]

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


MOLE = MoLESettings(num_experts=2, rank=2, dropout=0.0)


def model_of(method: str, *, tiles: bool = False, **options: Any) -> Method:
    torch.manual_seed(0)
    clip = (TiledClipEncoder if tiles else ClipEncoder)(config=CLIP_FIELDS, mole=MOLE if method == "movekd" else None)
    language = PrefixLM(config=LLAMA, image_newline=tiles)
    if method == "movekd":
        return MoVEKD(clip=clip, experts=tiny_experts(), language=language, **options).eval()
    model = ToVE(clip=clip, experts=tiny_experts(), language=language)
    if method == "tove":
        return model.eval()
    options = {"teacher": shake(model).eval(), "student": MergeStudent(mole=MOLE), "lm_weight": 0.7, **options}
    return merging_of(**options).eval()


def mixed(*, pixels: int = 0) -> Batch:
    """Two images of which the second stands for a sample of text alone."""
    batch = noise_batch()
    images = batch.images_BCHW.clone()
    images[1] = pixels
    return replace(batch, images_BCHW=images, has_image_B=torch.tensor([True, False]))


def logits(model: Method, batch: Batch) -> Tensor:
    assert batch.text is not None
    found: Tensor = model.language(model.encode(batch), batch.text).logits_MV
    return found


@pytest.mark.parametrize("method", METHODS)
def test_text_alone_reads_no_placeholder(method: str) -> None:
    model = model_of(method)
    with torch.no_grad():
        black, white = logits(model, mixed(pixels=0)), logits(model, mixed(pixels=255))
        assert torch.equal(black[:-3], white[:-3])  # the first image's texts
        torch.testing.assert_close(black, white)
        with_image = logits(model, replace(mixed(pixels=255), has_image_B=None))
    assert not torch.allclose(with_image[-3:], white[-3:])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_mixed_samples_has_a_gradient(method: str) -> None:
    model = model_of(method)
    loss = model.step(mixed()).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert float(loss) == pytest.approx(
        float(model.step(mixed(pixels=255)).loss), abs=1e-5
    )  # placeholders mean nothing


@pytest.mark.parametrize("method", METHODS)
def test_placeholders_take_no_part_in_any_loss(method: str) -> None:
    model = model_of(method)
    with torch.no_grad():
        black, white = (model.step(mixed(pixels=pixels)).parts for pixels in (0, 255))
    compared = {"tove": set(), "movekd": {"kd_loss"}, "merging": {"token_loss", "nmse"}}[method]
    assert {"text_loss", "balance_loss", *compared} <= black.keys()
    for name, value in black.items():
        assert float(value) == pytest.approx(float(white[name]), abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("method", METHODS)
def test_texts_that_say_where_the_image_goes_are_read(method: str) -> None:
    """A chat template's marker stands in the texts of samples with an image, and in no other."""
    marked = pack([[([5, IMAGE_TOKEN, 6, 7, 8], 3)], [([9, 10, 11], 1)]], 0)
    model = model_of(method)
    with torch.no_grad():
        black, white = (model.step(replace(mixed(pixels=pixels), text=marked)).parts for pixels in (0, 255))
        alone: Tensor = model.language.model(input_ids=torch.tensor([[9, 10, 11]])).logits[0, :2]  # type: ignore[operator]
        both_MV = logits(model, replace(mixed(), text=marked))
    assert float(black["text_loss"]) == pytest.approx(float(white["text_loss"]), abs=1e-6)
    torch.testing.assert_close(both_MV[2:], alone)
    nll = torch.nn.functional.cross_entropy(both_MV, torch.tensor([7, 8, 10, 11]))
    assert float(black["text_loss"]) == pytest.approx(float(nll), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_tiles_reach_the_language_model(method: str) -> None:
    model = model_of(method, tiles=True)
    batch = noise_batch(size=32)
    wide = replace(batch, original_hw_B2=torch.tensor([[32, 64], [64, 32]]))
    with torch.no_grad():
        vision = model.encode(wide)
    # 16 tokens of the whole image and 2 tiles of 16; a newline after each row of the joined tiles: 4 rows, or 8.
    assert vision.lengths == (16 + 32 + 4, 16 + 32 + 8)
    loss = model.step(wide).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_merging_trains_on_what_is_shipped_then() -> None:
    """Every view of an image in tiles, each against what the teacher makes of the same view."""
    model = model_of("merging", tiles=True, student=None)
    assert isinstance(model, Merging)
    wide = replace(
        noise_batch(size=32), original_hw_B2=torch.tensor([[32, 64], [64, 32]]), has_image_B=torch.tensor([True, False])
    )
    views = model.clip.views_of(wide).batch
    there_V = torch.tensor([True, False, True, True, False, False])  # the whole images, then two tiles of each
    with torch.no_grad():
        own_BTD = model.projector(model.clip(views.images_01()).tokens_BTD)[there_V]
        target_BTD = model.teacher.transferred(views).tokens_BTD[there_V]
        found = model.step(wide).parts["token_loss"]
        assert float(found) == pytest.approx(float(token_distance(own_BTD, target_BTD)), rel=1e-5)
        read = model.encode(wide)
        shipped = model.merged().eval().encode(wide)
    assert read.lengths == shipped.lengths == (16 + 32 + 4, 0)
    torch.testing.assert_close(read.tokens_BTD, shipped.tokens_BTD)


def test_stored_targets_are_of_whole_images_only() -> None:
    with pytest.raises(ConfigError, match=r"targets='store'.*tiles.*live"):
        model_of("merging", tiles=True, targets="store")


def test_text_alone_needs_no_image_at_all() -> None:
    text = pack([[([5, 6, 7, 8], 2)], [([9, 10, 11], 1)]], 0)
    batch = Batch(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.arange(2),
        "train",
        text=text,
        has_image_B=torch.tensor([False, False]),
    )
    model = model_of("movekd")
    assert torch.isfinite(model.step(batch).loss)
    language: Any = model.language
    alone: Tensor = language.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 1:3]
    torch.testing.assert_close(logits(model, batch)[:2], alone)


def test_a_store_serves_teachers_beside_tiles_and_is_refused_where_tiles_are_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MoVE-KD's teachers see whole images, whose tokens are those of the store; ToVE's experts see each tile."""
    batch = noise_batch()
    store = StoreSettings(folder=str(tmp_path), dtype="float32", batch_size=2)
    found = []
    for options in (dict[str, Any](), {"store": store}):
        model = model_of("movekd", tiles=True, **options)
        assert isinstance(model, MoVEKD)
        if options:
            source = MemoryImages(2)
            source.images_BCHW = batch.images_BCHW
            cache = store.open()
            assert cache is not None
            model.read_features(cache, {"train": source})
            monkeypatch.setattr(VisionExpert, "forward", None)
        views = model.clip.views_of(batch)
        found.append(model.compare(Seen(batch, views, model.view_tokens(views.batch))))
    live, stored = (each.terms["kd_loss"].value for each in found)
    assert torch.equal(live, stored) and live > 0
    with pytest.raises(ConfigError, match=r"store\.folder=.*tiles.*null"):
        ToVE(
            clip=TiledClipEncoder(config=CLIP_FIELDS),
            experts=tiny_experts(),
            language=PrefixLM(config=LLAMA, image_newline=True),
            store=store,
        )
