"""Training at several image sizes, and on crops that are shifted against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.helpers import CLIP_FIELDS, bare_trainer, noise_batch
from tests.methods.movekd.helpers import decoder, shaken, tiny_movekd, unit
from visexpert.errors import ConfigError
from visexpert.experts import resize_images
from visexpert.grids import resample_tokens
from visexpert.language import NoLanguage
from visexpert.methods import AgglomerationSettings, MoVEKD
from visexpert.methods.movekd.looks import Corner, Look, Looks, overlapping
from visexpert.methods.settings import StoreSettings
from visexpert.tabletop import TabletopData
from visexpert.types import Batch
from visexpert.vision import ClipEncoder, TimmEncoder

MakeData = Callable[..., TabletopData]
CORNERS: list[Corner] = [(top, left) for top, left in product(range(3), repeat=2)]


def alone(**options: Any) -> MoVEKD:
    """Images alone, CLIP a teacher beside the experts."""
    return tiny_movekd(**{"language": NoLanguage(), "lm_weight": 0.0, "balance_weight": 0.0, "plain": True, **options})


def looking(model: MoVEKD, look: Look) -> MoVEKD:
    model._look = look
    model.train()
    return model


def drawn(seed: int = 0, count: int = 30, **settings: Any) -> list[Look]:
    looks = Looks(ClipEncoder(config=CLIP_FIELDS), AgglomerationSettings(**settings))
    return [looks.draw(seed, batch) for batch in range(count)]


# -- Several sizes ----------------------------------------------------------------------------------------------------


def test_each_round_of_batches_has_every_size_once() -> None:
    looks = drawn(image_sizes=[16, 32, 48])
    rounds = [tuple(look.side for look in looks[first : first + 3]) for first in range(0, 30, 3)]
    assert {tuple(sorted(sides)) for sides in rounds} == {(16, 32, 48)}
    assert len(set(rounds)) > 1  # in random order
    assert looks == drawn(image_sizes=[16, 32, 48]) != drawn(seed=1, image_sizes=[16, 32, 48])


def test_a_batch_is_seen_at_its_size_and_compared_on_the_encoders_own_grid() -> None:
    model, batch = alone(image_sizes=[16, 48], clip_teacher_weight=1.0, use=[]), noise_batch(size=48)
    for side in (16, 48):
        shaken(looking(model, Look(side)))
        with model.clip.at_size(side):
            own = model.clip(unit(batch))
        assert own.grid_hw == (side // 8, side // 8)
        target = model.clip(unit(batch)).tokens_BTD  # the frozen copy's
        resampled = resample_tokens(own.tokens_BTD, own.grid_hw, (4, 4))
        expected = float((resampled - target).square().mean().detach())
        assert expected > 1e-4
        assert float(model.step(batch).parts["kd_loss"]) == pytest.approx(expected, rel=1e-4)


def test_teachers_read_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = alone(image_sizes=[48]), []
    expert = model.hub["semantic"]
    encode = expert.encode

    def watched(pixels_BCHW: Tensor) -> Tensor:
        seen.append(pixels_BCHW.shape)
        return encode(pixels_BCHW)

    monkeypatch.setattr(expert, "encode", watched)
    looking(model, Look(48)).step(noise_batch(size=32))
    assert seen == [(2, 3, 48, 48)] and expert.image_size == 48


def test_validation_and_export_use_the_encoders_own_size() -> None:
    batch = noise_batch()
    plain, varied = alone(), alone(image_sizes=[16, 48], shift=2)
    varied.load_state_dict(plain.state_dict())
    for model in (plain, varied):
        model.eval()
    assert varied.clip.image_size == 32
    expected, found = (model.encode(batch).tokens_BTD for model in (plain, varied))
    assert torch.equal(expected, found)
    assert float(plain.step(batch).loss) == float(varied.step(batch).loss)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_draws_the_same_sizes_after_a_restart(
    interrupted: bool, tmp_path: Path, data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    preprocess = ClipEncoder.preprocess

    def watched(self: ClipEncoder, images_BCHW: Tensor) -> Tensor:
        if self is model.clip:
            seen.append(self.image_size)
        return preprocess(self, images_BCHW)

    monkeypatch.setattr(ClipEncoder, "preprocess", watched)
    model = alone(image_sizes=[16, 32, 48])
    trainer = bare_trainer(tmp_path, steps=3 if interrupted else 6)
    trainer.fit(model, datamodule=data())
    if interrupted:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        model = alone(image_sizes=[16, 32, 48])
        bare_trainer(tmp_path, steps=6).fit(model, datamodule=data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert seen == [look.side for look in drawn(seed=5, count=6, image_sizes=[16, 32, 48])]
    assert Counter(seen) == {16: 2, 32: 2, 48: 2}


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([32, 20], r"\[32, 20\].*20 px.*8 px.*16 or 24"),
        ([4], "4 px.*8 or 16"),
        ([32, 32], "twice"),
        ([0], "image_sizes is 0"),
    ],
)
def test_sizes_that_the_student_cannot_take_are_refused(sizes: list[int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        alone(image_sizes=sizes)


def timm_vit(**arguments: Any) -> TimmEncoder:
    small = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return TimmEncoder(model="vit_tiny_patch16_224", image_size=32, layer=-1, arguments={**small, **arguments})


def test_a_vit_of_timm_must_be_built_for_any_size() -> None:
    with pytest.raises(ConfigError, match=r"32 px only, got 48.*dynamic_img_size"):
        timm_vit().require_size(48)
    timm_vit().require_size(32)
    encoder = timm_vit(dynamic_img_size=True).eval()
    encoder.require_size(48)
    images_BCHW = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with encoder.at_size(48), torch.no_grad():
        own = encoder(images_BCHW)
        (theirs,) = encoder.model.forward_intermediates(  # type: ignore[operator]
            encoder.preprocess(images_BCHW), indices=[1], norm=False, output_fmt="NLC", intermediates_only=True
        )
    assert own.grid_hw == (6, 6) and encoder.grid_hw == (4, 4)
    torch.testing.assert_close(own.tokens_BTD, theirs, atol=1e-5, rtol=0)


def test_beits_biases_fit_one_size() -> None:
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = TimmEncoder(model="beit_base_patch16_224", image_size=32, layer=-1, arguments=small)
    with pytest.raises(ConfigError, match=r"Beit.*32 px only, got 48"):
        encoder.require_size(48)


# -- Shifted crops ----------------------------------------------------------------------------------------------------


def patches_alone(*, places: bool = False, **options: Any) -> MoVEKD:
    """A student that is a pure patch embedding, and a teacher that is its copy; ``places``: it tells places apart."""
    model = alone(depth=2, use=[], clip_teacher_weight=1.0, shift=2, **options)
    for clip in (model.clip, model.anchor):
        assert isinstance(clip, ClipEncoder)
        (block,) = clip.read_blocks()
        for name in ("self_attn.out_proj", "mlp.fc2"):
            for parameter in block.get_submodule(name).parameters():
                torch.nn.init.zeros_(parameter)
        if not places:
            torch.nn.init.zeros_(clip.model.embeddings.position_embedding.weight)
    return model


def kd_losses(model: MoVEKD, batch: Batch) -> dict[tuple[Corner, Corner], float]:
    looks = {(own, theirs): Look(32, 2, own, theirs) for own, theirs in product(CORNERS, repeat=2)}
    return {pair: float(looking(model, look).step(batch).parts["kd_loss"]) for pair, look in looks.items()}


@pytest.mark.parametrize("tokens", ["uniform", "attention"])
@pytest.mark.parametrize("size", [20, 48])
def test_a_patch_embedding_that_learns_from_itself_has_no_loss_at_any_shift(size: int, tokens: str) -> None:
    losses = kd_losses(patches_alone(tokens=tokens), noise_batch(size=size))
    assert len(losses) == 81 and max(losses.values()) < 1e-12


def test_larger_images_leave_a_loss_only_where_crops_end() -> None:
    """CLIP's bicubic halving reads two pixels beyond a patch, which the other crop may not have."""
    losses = kd_losses(patches_alone(), noise_batch(size=96))
    assert losses[(1, 1), (1, 1)] == 0.0 and max(losses.values()) < 0.05 * spread(noise_batch(size=96))


def spread(batch: Batch) -> float:
    """The loss between patches that do not belong together."""
    tokens_BTD = patches_alone().clip(unit(batch)).tokens_BTD.detach()
    return float((tokens_BTD - tokens_BTD.roll(1, dims=1)).square().mean())


def test_what_a_teacher_adds_at_fixed_places_is_seen_only_by_a_shift() -> None:
    losses = kd_losses(patches_alone(places=True), noise_batch(size=48))
    still = {pair: loss for pair, loss in losses.items() if pair[0] == pair[1]}
    assert max(still.values()) < 1e-12 < 1e-6 < min(loss for pair, loss in losses.items() if pair not in still)


def test_crops_overlap_by_hand() -> None:
    """A frame of 3 x 4 cells, numbered by row; crops of 2 x 3."""
    frame = torch.arange(12).view(3, 4)
    own, theirs = frame[0:2, 1:4].reshape(1, 6, 1), frame[1:3, 0:3].reshape(1, 6, 1)
    shown = [5, 6]  # the second row of the first crop, the first of the second
    assert overlapping(own, (2, 3), (0, 1), (1, 0)).flatten().tolist() == shown
    assert overlapping(theirs, (2, 3), (1, 0), (0, 1)).flatten().tolist() == shown


def test_student_and_teachers_shift_by_up_to_as_many_patches() -> None:
    looks = drawn(shift=2, count=60)
    corners = {corner for look in looks for corner in (*look.student, *look.teachers)}
    assert corners == {0, 1, 2} and {look.side for look in looks} == {32}
    assert any(look.student != look.teachers for look in looks)


def test_a_shifted_step_crops_images_for_all_experts_and_text_stays() -> None:
    model, batch = alone(shift=1, image_sizes=[16, 48]), noise_batch(size=40)
    assert model.looks is not None
    seen = looking(model, Look(48, 1, (1, 0), (0, 0))).see(batch)
    assert seen.batch is batch and seen.tokens.grid_hw == (6, 6)
    torch.testing.assert_close(seen.views.batch.images_BCHW, unit(batch)[..., 8:, :32])
    shifted = model.looks.cropped(model.looks.framed(batch), (0, 1))
    assert shifted.split == "" and torch.equal(shifted.images_BCHW, unit(batch)[..., :32, 8:])
    model.step(batch).loss.backward()  # all heads, on other grids than CLIP's


def test_the_frame_of_a_step_is_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teachers are cropped from the same pixels."""
    sides: list[int] = []

    def counted(images_BCHW: Tensor, side: int) -> Tensor:
        sides.append(side)
        return resize_images(images_BCHW, side)

    monkeypatch.setattr("visexpert.methods.movekd.looks.resize_images", counted)
    model = looking(alone(shift=1), Look(32, 1, (1, 0), (0, 0)))
    model.step(noise_batch(size=33))
    assert sides == [40]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"store": StoreSettings(folder="tokens")}, r"shift=1.*store\.folder='tokens'.*null"),
        ({"keep_pooled": 0.5}, r"keep_pooled=0\.5"),
        ({"lm_weight": 1.0, "language": None}, "lm_weight=1"),
        ({"alignment": "to_student", "adapter": "released"}, "released.*linear or mlp"),
        ({"alignment": "to_student"}, "released.*linear or mlp"),
        ({"shift": 4}, "shift=4.*4 x 4.*at most 3"),
        ({"teachers": "gate"}, "gate.*uniform"),
        ({"shift": -1}, "shift is -1"),
    ],
)
def test_what_a_shift_cannot_go_with_is_refused(options: dict[str, Any], named: str) -> None:
    given = {"shift": 1, **options}
    if given.get("language", 0) is None:
        given["language"] = decoder()
    with pytest.raises(ConfigError, match=named):
        alone(**given)
