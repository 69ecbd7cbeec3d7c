"""Scenes: reproducible one by one, valid without exception, with the promised priors."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from visexpert.errors import ConfigError
from visexpert.tabletop import scenes as scenes_module
from visexpert.tabletop.raycast import visible_pixels
from visexpert.tabletop.scenes import FRAME_LIMIT, MIN_VISIBLE_PIXELS, VISIBILITY_SIZE, sample_scenes
from visexpert.tabletop.world import COLOURS, SHAPE_HALF_EXTENT, SHAPES, SIZE_RADIUS, SIZES, TAN_HALF_FOV, Scenes
from visexpert.tabletop.world import TabletopWorld as World


@pytest.fixture(scope="module")
def many() -> Scenes:
    return sample_scenes(1000, seed=11, world=World())


def _assert_same(a: Scenes, b: Scenes) -> None:
    for field in fields(Scenes):
        if field.name != "world":
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_scene_does_not_depend_on_its_batch(many: Scenes) -> None:
    _assert_same(sample_scenes(3, seed=11, first=500, world=World()), many.rows(slice(500, 503)))
    _assert_same(sample_scenes(1, seed=11, first=999, world=World()), many.rows([999]))


@pytest.mark.parametrize("seed", [12, -11, 2**70])
def test_seeds_are_unrelated(many: Scenes, seed: int) -> None:
    other = sample_scenes(20, seed=seed, world=World())
    assert not torch.isin(other.eye_N3, many.eye_N3[:, 0]).any()


def test_slots_are_filled_from_the_front(many: Scenes) -> None:
    filled = torch.arange(5) < many.num_objects_N[:, None]
    for name in ("shape_NO", "colour_NO", "size_NO", "material_NO"):
        assert torch.equal(getattr(many, name) >= 0, filled)


def test_colours_are_unique_in_a_scene(many: Scenes) -> None:
    for colours, num in zip(many.colour_NO.tolist(), many.num_objects_N.tolist(), strict=True):
        assert len(set(colours[:num])) == num


def test_phrases_are_unique_where_colours_may_repeat() -> None:
    scenes = sample_scenes(400, seed=0, world=World(unique_colours=False, min_objects=5))
    pairs = (scenes.colour_NO * len(SHAPES) + scenes.shape_NO).tolist()
    assert all(len(set(row)) == 5 for row in pairs)
    assert any(len(set(row)) < 5 for row in scenes.colour_NO.tolist())


def test_priors_are_skewed_as_promised(many: Scenes) -> None:
    world = World()
    assert world.colour_prior[0] > 3 * world.colour_prior[-1]
    for drawn_N, prior in ((many.colour_NO[:, 0], world.colour_prior), (many.shape_NO[:, 0], world.shape_prior)):
        observed = torch.bincount(drawn_N, minlength=len(prior)).numpy()
        expected = np.array(prior) * len(many)
        chi2 = float(((observed - expected) ** 2 / expected).sum())
        assert chi2 < 27.0  # 99.97 % point for 7 degrees of freedom
    sizes = torch.bincount(many.size_NO[many.size_NO >= 0], minlength=len(SIZES)).float()
    assert ((sizes / sizes.sum() - 1 / 3).abs() < 0.03).all()


def test_rejection_leaves_the_number_of_objects_uniform(many: Scenes) -> None:
    observed = torch.bincount(many.num_objects_N, minlength=6)[2:].float() / len(many)
    assert ((observed - 0.25).abs() < 0.055).all()  # 4 sigma


def test_each_object_is_visible_and_inside_the_frame(many: Scenes) -> None:
    filled = many.shape_NO >= 0
    assert (visible_pixels(many, size=VISIBILITY_SIZE)[filled] >= MIN_VISIBLE_PIXELS).all()
    offset = many.center_NO3.double() - many.eye_N3[:, None].double()
    right, up, depth = torch.einsum("nok,nak->ano", offset, many.axes_N33.double())
    assert (depth[filled] > 0).all()
    assert ((right.abs() / depth)[filled] <= FRAME_LIMIT * TAN_HALF_FOV + 1e-5).all()
    assert ((up.abs() / depth)[filled] <= FRAME_LIMIT * TAN_HALF_FOV + 1e-5).all()


def test_objects_neither_touch_nor_sink_into_the_table(many: Scenes) -> None:
    half = torch.tensor([SHAPE_HALF_EXTENT[shape] for shape in SHAPES])[many.shape_NO]
    half = half * torch.tensor([SIZE_RADIUS[size] for size in SIZES])[many.size_NO][..., None]
    filled = many.shape_NO >= 0
    lift = (many.center_NO3[..., 2] - half[..., 2])[filled]
    assert (lift > -1e-5).all()
    standing = lift < 1e-4
    assert 0.35 < standing.float().mean() < 0.65
    assert (lift[~standing] > 0.199).all() and (lift[~standing] < 1.701).all()
    # Two bodies are apart where the spheres inside them are (from other sizes than the sampler's).
    gap = torch.cdist(many.center_NO3, many.center_NO3) - half.amin(-1)[:, :, None] - half.amin(-1)[:, None, :]
    pair = filled[:, :, None] & filled[:, None, :] & ~torch.eye(5, dtype=torch.bool)
    assert (gap[pair] > 0).all()


def test_shapes_of_one_size_have_equal_volume() -> None:
    ball = 4 / 3 * np.pi
    cube, cylinder = SHAPE_HALF_EXTENT["cube"], SHAPE_HALF_EXTENT["cylinder"]
    assert 8 * cube[0] * cube[1] * cube[2] == pytest.approx(ball, rel=0.01)
    assert np.pi * cylinder[0] ** 2 * 2 * cylinder[2] == pytest.approx(ball, rel=0.01)


def test_camera_axes_are_orthonormal_and_light_is_a_unit_vector(many: Scenes) -> None:
    axes = many.axes_N33.double()
    assert torch.allclose(axes @ axes.mT, torch.eye(3).double().expand(1000, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(axes), torch.full((1000,), -1.0).double(), atol=1e-6)  # right, up, forward
    assert torch.allclose(many.light_N3.norm(dim=1), torch.ones(1000), atol=1e-6)
    assert (many.light_N3[:, 2] > 0.5).all()


def test_without_jitter_camera_and_light_stand_still() -> None:
    scenes = sample_scenes(5, seed=0, world=World(camera_jitter=0.0, light_jitter=0.0))
    assert torch.equal(scenes.eye_N3, scenes.eye_N3[:1].expand(5, 3))
    assert torch.equal(scenes.light_N3, scenes.light_N3[:1].expand(5, 3))


def test_a_world_that_is_too_crowded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes_module, "_MAX_ATTEMPTS", 1)
    with pytest.raises(ConfigError, match=r"scene \d+ of seed 5 .*max_objects \(now 6\)"):
        sample_scenes(200, seed=5, world=World(min_objects=6, max_objects=6))


def test_no_scenes_is_an_empty_batch() -> None:
    assert len(sample_scenes(0, seed=0, world=World())) == 0


@pytest.mark.parametrize(
    "settings",
    [{"min_objects": 4, "max_objects": 3}, {"max_objects": 7}, {"image_size": 8}, {"fog": -0.1}, {"colour_skew": 0.0}],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(settings))):
        World(**settings)  # type: ignore[arg-type]


def test_fingerprint_changes_with_each_setting() -> None:
    world = World()
    other = {
        "image_size": 64,
        "min_objects": 3,
        "max_objects": 4,
        "unique_colours": False,
        "colour_skew": 0.7,
        "shape_skew": 0.7,
        "shiny_probability": 0.4,
        "float_probability": 0.4,
        "camera_jitter": 0.5,
        "light_jitter": 0.5,
        "fog": 0.0,
        "noise": 0.0,
    }
    assert set(other) == {field.name for field in fields(World)}
    prints = {replace(world, **{name: value}).fingerprint() for name, value in other.items()}  # type: ignore[arg-type]
    assert len(prints | {world.fingerprint()}) == len(other) + 1
    assert World().fingerprint() == world.fingerprint()
    assert len(COLOURS) == len(world.colour_prior) == 8
