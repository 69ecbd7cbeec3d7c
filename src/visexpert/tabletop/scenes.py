"""Random scenes of the embedded world, each one a pure function of (seed, index).

Every scene draws from its own Philox counter stream, so it is the same whatever batch or process samples it. What a
scene contains (objects, camera, light) is drawn once; only the placement is drawn again when an object would lie
outside the frame, inside another or hidden, so rejection leaves the priors of all attributes untouched.

World frame: x and y span the table, z points up, the table is z = 0. Lengths are scene units.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.tabletop.raycast import visible_pixels
from visexpert.tabletop.world import (
    COLOUR_RGB,
    COLOURS,
    SHAPE_HALF_EXTENT,
    SHAPES,
    SIZE_RADIUS,
    SIZES,
    TAN_HALF_FOV,
    Scenes,
    TabletopWorld,
)

Array: TypeAlias = npt.NDArray[Any]

MIN_VISIBLE_PIXELS = 14
"""Minimum number of visible pixels of each object in a scene rendered at ``VISIBILITY_SIZE``."""

VISIBILITY_SIZE = 64
FRAME_LIMIT = 0.88
"""Largest |u| and |v| of an object's center."""

_CAMERA_DISTANCE = 7.5
_CAMERA_ELEVATION = math.radians(35.0)
_CAMERA_TARGET_HEIGHT = 0.6
_DEPTH_RANGE = (5.5, 10.5)
_LIFT_RANGE = (0.2, 1.7)
_CANDIDATES = 12
_MAX_ATTEMPTS = 300
_SCENE_DRAWS, _OBJECT_DRAWS, _PLACE_DRAWS = 10, 8, 4


def sample_scenes(num: int, *, seed: int, first: int = 0, world: TabletopWorld) -> Scenes:
    """Sample scenes ``first`` to ``first + num - 1`` of a seed's endless stream.

    Args:
        num: Number of scenes.
        seed: Any integer; different seeds give unrelated scenes.
        first: Index of the first scene in the stream.
        world: Settings.

    Raises:
        ConfigError: If the settings are so crowded that a scene finds no valid placement.
    """
    words = np.random.SeedSequence([abs(seed), int(seed < 0)]).generate_state(1, np.uint64)
    key_N2 = np.stack([np.repeat(words, num), np.arange(first, first + num, dtype=np.uint64)], axis=1)
    scenes = _content(key_N2, world)
    pending = np.arange(num)
    center_NO3 = scenes.center_NO3.clone()
    for attempt in range(_MAX_ATTEMPTS):
        if not len(pending):
            return replace(scenes, center_NO3=center_NO3)
        candidate = scenes.rows(pending.tolist())
        candidate, valid_N = _place(candidate, key_N2[pending], attempt)
        valid_N[valid_N] = _all_visible(candidate.rows(np.flatnonzero(valid_N).tolist()))
        center_NO3[pending[valid_N]] = candidate.center_NO3[valid_N]
        pending = pending[~valid_N]
    raise ConfigError(
        f"scene {first + int(pending[0])} of seed {seed} found no placement for its objects in {_MAX_ATTEMPTS} "
        f"attempts; lower TabletopWorld.max_objects (now {world.max_objects})."
    )


def draws(key_N2: Array, stream: int, count: int) -> Array:
    """Return ``count`` uniform numbers in [0, 1) per scene key, float64 (N, count), from one of its streams."""
    rows = [generator(key, stream).random(count) for key in key_N2]
    return np.stack(rows) if rows else np.zeros((0, count))


def generator(key: Array, stream: int) -> np.random.Generator:
    """Return the random generator of one stream (0 = content, 1 = pixel noise, 2 + a = a-th placement) of a scene."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def _content(key_N2: Array, world: TabletopWorld) -> Scenes:
    """Draw everything in a scene except the placement of its objects."""
    num_slots = world.max_objects
    draw_ND = draws(key_N2, 0, _SCENE_DRAWS + _OBJECT_DRAWS * num_slots)
    scene = draw_ND[:, :_SCENE_DRAWS]
    per_object = draw_ND[:, _SCENE_DRAWS:].reshape(-1, num_slots, _OBJECT_DRAWS)
    num_N = world.min_objects + np.floor(scene[:, 0] * (world.max_objects - world.min_objects + 1)).astype(np.int64)
    filled_NO = np.arange(num_slots) < num_N[:, None]
    colour_NO, shape_NO = _phrases(per_object[..., 0], world)
    size_NO = np.floor(per_object[..., 1] * len(SIZES)).astype(np.int64)
    material_NO = (per_object[..., 2] < world.shiny_probability).astype(np.int64)
    palette = np.array([COLOUR_RGB[colour] for colour in COLOURS])
    # One factor for brightness and one per channel: colours vary, but each still fits its word.
    albedo_NO3 = palette[colour_NO] * (0.88 + 0.12 * per_object[..., 3:4]) + 0.06 * (per_object[..., 4:7] - 0.5)
    eye_N3, axes_N33 = _camera(scene[:, 1:4], world.camera_jitter)
    light_N3, brightness_N = _light(scene[:, 4:7], axes_N33, world.light_jitter)
    table_N3 = np.array([0.60, 0.57, 0.53]) * (0.85 + 0.3 * scene[:, 7:8]) + 0.05 * (scene[:, 7:10] - 0.5)
    return Scenes(
        world=world,
        num_objects_N=torch.from_numpy(num_N),
        shape_NO=_filled(shape_NO, filled_NO),
        colour_NO=_filled(colour_NO, filled_NO),
        size_NO=_filled(size_NO, filled_NO),
        material_NO=_filled(material_NO, filled_NO),
        center_NO3=torch.zeros(len(num_N), num_slots, 3),
        yaw_NO=_float32(per_object[..., 7] * (2 * math.pi)),
        albedo_NO3=_float32(albedo_NO3.clip(0, 1)),
        eye_N3=_float32(eye_N3),
        axes_N33=_float32(axes_N33),
        light_N3=_float32(light_N3),
        brightness_N=_float32(brightness_N),
        table_N3=_float32(table_N3),
        key_N2=torch.from_numpy(key_N2.view(np.int64).copy()),
    )


def _phrases(uniform_NO: Array, world: TabletopWorld) -> tuple[Array, Array]:
    """Draw (colour, shape) pairs without replacement, each with the product of the two priors."""
    prior = np.outer(world.colour_prior, world.shape_prior).reshape(-1)
    weight_NP = np.repeat(prior[None], len(uniform_NO), axis=0)
    chosen_NO = np.zeros(uniform_NO.shape, dtype=np.int64)
    rows = np.arange(len(uniform_NO))
    for slot in range(uniform_NO.shape[1]):
        total_NP = weight_NP.cumsum(axis=1)
        pair_N = (total_NP <= uniform_NO[:, slot, None] * total_NP[:, -1:]).sum(axis=1)
        chosen_NO[:, slot] = pair_N
        if world.unique_colours:
            used_NP = np.arange(len(prior)) // len(SHAPES) == pair_N[:, None] // len(SHAPES)
            weight_NP[used_NP] = 0.0
        else:
            weight_NP[rows, pair_N] = 0.0
    return chosen_NO // len(SHAPES), chosen_NO % len(SHAPES)


def _camera(uniform_N3: Array, jitter: float) -> tuple[Array, Array]:
    """Return the eye (N, 3) and the rows right, up, forward (N, 3, 3) of cameras that look down at the table."""
    shift_N3 = (2 * uniform_N3 - 1) * jitter
    azimuth_N = math.radians(30.0) * shift_N3[:, 0]
    elevation_N = _CAMERA_ELEVATION + math.radians(4.0) * shift_N3[:, 1]
    distance_N = _CAMERA_DISTANCE + 0.4 * shift_N3[:, 2]
    # Trigonometry is done in float64 and rounded to float32, which hides differences of libraries in the last bit.
    sin_a, cos_a, sin_e, cos_e = np.sin(azimuth_N), np.cos(azimuth_N), np.sin(elevation_N), np.cos(elevation_N)
    zero_N = np.zeros_like(sin_a)
    right = np.stack([cos_a, sin_a, zero_N], axis=1)
    up = np.stack([-sin_a * sin_e, cos_a * sin_e, cos_e], axis=1)
    forward = np.stack([-sin_a * cos_e, cos_a * cos_e, -sin_e], axis=1)
    eye_N3 = np.array([0.0, 0.0, _CAMERA_TARGET_HEIGHT]) - distance_N[:, None] * forward
    return eye_N3, np.stack([right, up, forward], axis=1)


def _light(uniform_N3: Array, axes_N33: Array, jitter: float) -> tuple[Array, Array]:
    """Return unit vectors towards a light above, to the left or right and on the camera's side, and its strength."""
    shift_N3 = (2 * uniform_N3 - 1) * jitter
    side_N1 = np.where(shift_N3[:, :1] < 0, -0.25, 0.25) + 0.65 * shift_N3[:, :1]
    height_N1 = 1.3 + 0.35 * shift_N3[:, 1:2]
    towards_N3 = axes_N33[:, 0] * side_N1 - axes_N33[:, 2] * [1.0, 1.0, 0.0] * 0.6 + height_N1 * [0.0, 0.0, 1.0]
    length_N1 = np.sqrt((towards_N3**2).sum(axis=1, keepdims=True))
    return towards_N3 / length_N1, 1.0 + 0.15 * shift_N3[:, 2]


def _place(scenes: Scenes, key_N2: Array, attempt: int) -> tuple[Scenes, Array]:
    """Put each object at the first of its candidate places that fits the objects before it.

    Candidates are uniform in image column and depth. Returns the scenes and which of them are fully placed.
    """
    N, num_slots = scenes.shape_NO.shape
    shape = (N, num_slots, _CANDIDATES, _PLACE_DRAWS)
    draw_NOC4 = draws(key_N2, 2 + attempt, math.prod(shape[1:])).reshape(shape)
    filled_NO = scenes.shape_NO.numpy() >= 0
    radius_NO, height_NO = _extents(scenes)
    eye_N3, axes_N33 = scenes.eye_N3.double().numpy(), scenes.axes_N33.double().numpy()
    camera_NO3 = np.zeros((N, num_slots, 3))
    placed_NO = ~filled_NO
    for slot in range(num_slots):
        hovers_NC = draw_NOC4[:, slot, :, 2] < scenes.world.float_probability
        lift_NC = _LIFT_RANGE[0] + draw_NOC4[:, slot, :, 3] * (_LIFT_RANGE[1] - _LIFT_RANGE[0])
        center_NC = np.where(hovers_NC, lift_NC, 0.0) + height_NO[:, slot, None]
        place_NC3 = _candidate_places(draw_NOC4[:, slot, :, :2], center_NC, eye_N3, axes_N33)
        fits_NC = np.abs(place_NC3[..., 1]) <= FRAME_LIMIT * TAN_HALF_FOV * place_NC3[..., 2]
        for other in range(slot):
            radii = radius_NO[:, slot, None], radius_NO[:, other, None]
            apart_NC = _apart(place_NC3, camera_NO3[:, None, other], *radii)
            fits_NC &= apart_NC | ~filled_NO[:, other, None]
        best_N = fits_NC.argmax(axis=1)
        camera_NO3[:, slot] = place_NC3[np.arange(N), best_N]
        placed_NO[:, slot] |= fits_NC.any(axis=1)
    terms = camera_NO3[..., :, None] * axes_N33[:, None]
    center_NO3 = np.where(filled_NO[..., None], eye_N3[:, None] + terms.sum(axis=2), 0.0)
    valid_N = np.asarray(placed_NO.all(axis=1))
    return replace(scenes, center_NO3=_float32(center_NO3)), valid_N


def _candidate_places(uniform_NC2: Array, height_NC: Array, eye_N3: Array, axes_N33: Array) -> Array:
    """Return camera-frame points (N, C, 3) at a drawn image column and depth and at a given height over the table."""
    depth_NC = _DEPTH_RANGE[0] + uniform_NC2[..., 1] * (_DEPTH_RANGE[1] - _DEPTH_RANGE[0])
    right_NC = (2 * uniform_NC2[..., 0] - 1) * FRAME_LIMIT * TAN_HALF_FOV * depth_NC
    up_NC = (height_NC - eye_N3[:, None, 2] - depth_NC * axes_N33[:, None, 2, 2]) / axes_N33[:, None, 1, 2]
    return np.stack([right_NC, up_NC, depth_NC], axis=-1)


def _apart(place_NC3: Array, other_N13: Array, radius_N1: Array, other_radius_N1: Array) -> Array:
    """Return which places neither touch the other object nor overlap most of it in the image."""
    gap2_NC = ((place_NC3 - other_N13) ** 2).sum(axis=-1)
    image_NC2, other_N12 = place_NC3[..., :2] / place_NC3[..., 2:], other_N13[..., :2] / other_N13[..., 2:]
    image_gap2_NC = ((image_NC2 - other_N12) ** 2).sum(axis=-1)
    reach_NC = radius_N1 / place_NC3[..., 2] + other_radius_N1 / other_N13[..., 2]
    apart_NC: Array = (gap2_NC > (radius_N1 + other_radius_N1) ** 2) & (image_gap2_NC > (0.5 * reach_NC) ** 2)
    return apart_NC


def _extents(scenes: Scenes) -> tuple[Array, Array]:
    """Return the radius of each object's bounding sphere and half its height (N, O)."""
    half = np.array([SHAPE_HALF_EXTENT[shape] for shape in SHAPES])
    bound = np.array([1.0, math.sqrt(3) * half[1, 0], math.hypot(half[2, 0], half[2, 2])])
    size_NO = np.array([SIZE_RADIUS[size] for size in SIZES])[scenes.size_NO.numpy()]
    shape_NO = scenes.shape_NO.numpy()
    return bound[shape_NO] * size_NO, half[shape_NO, 2] * size_NO


def _all_visible(scenes: Scenes) -> Array:
    if not len(scenes):
        return np.zeros(0, dtype=bool)
    seen_NO = visible_pixels(scenes, size=VISIBILITY_SIZE) >= MIN_VISIBLE_PIXELS
    return (seen_NO | (scenes.shape_NO < 0)).all(dim=1).numpy()


def _filled(value_NO: Array, filled_NO: Array) -> Tensor:
    return torch.from_numpy(np.where(filled_NO, value_NO, -1))


def _float32(value: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
