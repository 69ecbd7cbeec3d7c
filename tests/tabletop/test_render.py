"""Renders against closed forms, a brute-force ray march in float64, and themselves taken apart."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch

from visexpert.tabletop.raycast import cast, object_groups, pixel_rays, shadowed
from visexpert.tabletop.render import Rendered, attribute_masks, render, scene_graphs
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.world import (
    COLOUR_RGB,
    COLOURS,
    MATERIALS,
    SHAPE_HALF_EXTENT,
    SHAPES,
    SIZE_RADIUS,
    SIZES,
    TAN_HALF_FOV,
    Scenes,
    TabletopWorld,
)

Array: TypeAlias = npt.NDArray[Any]
SIZE = 96


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(40, seed=21, world=TabletopWorld())


@pytest.fixture(scope="module")
def rendered(scenes: Scenes) -> Rendered:
    return render(scenes, size=SIZE)


def _only(scenes: Scenes, slot: int) -> Scenes:
    """Empty all slots but one; its instance number stays slot + 1."""
    keep = torch.arange(scenes.shape_NO.shape[1]) == slot
    return replace(scenes, shape_NO=torch.where(keep, scenes.shape_NO, -1))


def _with_shape(scenes: Scenes, shape: str) -> Scenes:
    """A single scene's first object alone, as another shape, lifted well above the table."""
    one = _only(scenes.rows([0]), 0)
    center = one.center_NO3.clone()
    center[..., 2] = 1.6
    return replace(one, shape_NO=torch.where(one.shape_NO >= 0, SHAPES.index(shape), -1), center_NO3=center)


def _world_rays(scenes: Scenes, size: int) -> tuple[Array, Array]:
    """Eye (3,) and rays (H, W, 3) of the first scene, in the world frame; the parameter is the depth."""
    eye, axes = scenes.eye_N3[0].double().numpy(), scenes.axes_N33[0].double().numpy()
    y, x = np.mgrid[0:size, 0:size]
    right = ((x + 0.5) / size * 2 - 1) * TAN_HALF_FOV
    up = (1 - (y + 0.5) / size * 2) * TAN_HALF_FOV
    return eye, right[..., None] * axes[0] + up[..., None] * axes[1] + axes[2]


def _points(scenes: Scenes, depth_HW: Array) -> Array:
    eye, rays = _world_rays(scenes, depth_HW.shape[0])
    points: Array = eye + depth_HW[..., None].astype(np.float64) * rays
    return points


def _world_normals(scenes: Scenes, rendered: Rendered) -> Array:
    """The first scene's normals turned back into the world frame."""
    x, y, z = np.moveaxis(rendered.normals_NHW3[0].double().numpy(), -1, 0)
    axes = scenes.axes_N33[0].double().numpy()
    normals: Array = x[..., None] * axes[0] + y[..., None] * axes[1] - z[..., None] * axes[2]
    return normals


def test_sphere_depth_and_normals_in_closed_form(scenes: Scenes) -> None:
    one = _with_shape(scenes, "sphere")
    result = render(one, size=SIZE)
    eye, rays = _world_rays(one, SIZE)
    center = one.center_NO3[0, 0].double().numpy()
    radius = SIZE_RADIUS[SIZES[int(one.size_NO[0, 0])]]
    a, b = (rays**2).sum(-1), (rays * (eye - center)).sum(-1)
    discriminant = b**2 - a * (((eye - center) ** 2).sum() - radius**2)
    inside = discriminant > 0
    mask = result.instance_NHW[0].numpy() == 1
    assert inside.sum() > 100
    assert (mask != inside).sum() <= 2  # rounding right on the silhouette
    safe = mask & (discriminant > 1e-2 * discriminant.max())
    depth = (-b - np.sqrt(discriminant.clip(0))) / a
    np.testing.assert_allclose(result.depth_NHW[0].numpy()[safe], depth[safe], rtol=2e-5)
    normal = (eye + depth[..., None] * rays - center) / radius
    np.testing.assert_allclose(_world_normals(one, result)[safe], normal[safe], atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_surface_agrees_with_a_ray_march(scenes: Scenes, shape: str) -> None:
    one, size = _with_shape(scenes, shape), 48
    result = render(one, size=size)
    eye, rays = _world_rays(one, size)
    center, yaw = one.center_NO3[0, 0].double().numpy(), float(one.yaw_NO[0, 0])
    half = np.array(SHAPE_HALF_EXTENT[shape]) * SIZE_RADIUS[SIZES[int(one.size_NO[0, 0])]]
    turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    start = float(np.linalg.norm(center - eye)) - 1.5
    step = 0.004
    first = np.full((size, size), np.inf)
    for depth in np.arange(start, start + 3.0, step)[::-1]:
        x, y, z = np.moveaxis(((eye + depth * rays - center) @ turn.T) / half, -1, 0)
        inside = {
            "sphere": x**2 + y**2 + z**2 < 1,
            "cube": np.maximum(np.maximum(abs(x), abs(y)), abs(z)) < 1,
            "cylinder": (x**2 + y**2 < 1) & (abs(z) < 1),
        }[shape]
        first[inside] = depth
    mask = result.instance_NHW[0].numpy() == 1
    assert mask.sum() > 60
    assert (mask != np.isfinite(first)).sum() <= 4  # rays that graze less than a step
    both = mask & np.isfinite(first)
    excess = first[both] - result.depth_NHW[0].numpy()[both]
    assert (excess > -1e-4).all() and (excess < step + 1e-4).all()


@pytest.mark.parametrize("shape", ["cube", "cylinder"])
def test_normals_stand_on_the_rendered_surface(scenes: Scenes, shape: str) -> None:
    one = _with_shape(scenes, shape)
    result = render(one, size=256)
    points, normals = _points(one, result.depth_NHW[0].numpy()), _world_normals(one, result)
    across, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    cross = np.cross(down, across)
    cross /= np.linalg.norm(cross, axis=-1, keepdims=True)
    smooth = (result.instance_NHW[0] == 1).numpy()[:-1, :-1] & ~result.edges_NHW[0].numpy()[:-1, :-1]
    assert smooth.sum() > 500
    cosine = (cross * normals[:-1, :-1]).sum(-1)[smooth]
    assert np.quantile(cosine, 0.05) > 0.98  # the limb of a cylinder bends within a pixel
    assert np.median(cosine) > 0.999


def test_background_is_the_table(scenes: Scenes, rendered: Rendered) -> None:
    points = _points(scenes, rendered.depth_NHW[0].numpy())
    table = rendered.instance_NHW[0].numpy() == 0
    assert np.abs(points[table][:, 2]).max() < 1e-3
    np.testing.assert_allclose(_world_normals(scenes, rendered)[table], [[0, 0, 1]] * int(table.sum()), atol=1e-5)


def test_normals_are_unit_and_face_the_viewer(scenes: Scenes, rendered: Rendered) -> None:
    assert torch.allclose(rendered.normals_NHW3.norm(dim=-1), torch.ones(1), atol=1e-5)
    rays = pixel_rays(SIZE)
    x, y, z = rendered.normals_NHW3.reshape(len(scenes), -1, 3).unbind(-1)
    assert (x * rays.xyz_3P[0] + y * rays.xyz_3P[1] - z < 1e-4).all()


def test_nearest_object_wins(scenes: Scenes, rendered: Rendered) -> None:
    """The whole scene equals its objects rendered one by one, put together by depth."""
    parts = [render(_only(scenes, slot), size=SIZE) for slot in range(5)]
    depth, owner = torch.stack([part.depth_NHW for part in parts]).min(dim=0)
    instance = torch.stack([part.instance_NHW for part in parts]).gather(0, owner[None])[0]
    assert torch.equal(rendered.depth_NHW, depth)
    assert torch.equal(rendered.instance_NHW, instance)
    hidden = torch.stack([part.instance_NHW for part in parts]).count_nonzero(0) > 1
    assert hidden.sum() > 100  # there are occlusions to decide


def test_each_scene_renders_to_the_same_bytes_in_any_batch(scenes: Scenes, rendered: Rendered) -> None:
    for index in (0, 7, 39):
        alone = render(scenes.rows([index]), size=SIZE)
        for field in fields(Rendered):
            assert torch.equal(getattr(alone, field.name)[0], getattr(rendered, field.name)[index]), field.name


def test_thread_count_does_not_change_a_byte(scenes: Scenes, rendered: Rendered) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        again = render(scenes.rows(slice(0, 3)), size=SIZE)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again.rgb_NHW3, rendered.rgb_NHW3[:3])


def test_shadow_of_a_sphere_on_the_table_in_closed_form(scenes: Scenes) -> None:
    one = _with_shape(scenes, "sphere")
    rays, groups = pixel_rays(SIZE), object_groups(one)
    hits = cast(one, groups, rays)
    shade = shadowed(one, groups, hits, rays, torch.ones(1, SIZE, SIZE, dtype=torch.bool))[0].numpy()
    points = _points(one, hits.depth_NHW[0].numpy())
    light, center = one.light_N3[0].double().numpy(), one.center_NO3[0, 0].double().numpy()
    distance = np.linalg.norm(np.cross(points - center, light), axis=-1)  # of the center to the line towards the light
    radius = SIZE_RADIUS[SIZES[int(one.size_NO[0, 0])]]
    table = hits.instance_NHW[0].numpy() == 0
    clear = table & (abs(distance - radius) > 1e-3)
    assert (shade == (distance < radius))[clear].all()
    assert shade[table].sum() > 50
    assert not shade[~table].any()  # a convex object never shades itself


def test_graph_holds_the_analytic_projection_and_the_visible_pixels(scenes: Scenes, rendered: Rendered) -> None:
    graphs = scene_graphs(scenes, rendered)
    assert [len(graph.objects) for graph in graphs] == scenes.num_objects_N.tolist()
    for index, graph in enumerate(graphs):
        eye, axes = scenes.eye_N3[index].double().numpy(), scenes.axes_N33[index].double().numpy()
        for slot, node in enumerate(graph.objects):
            right, up, depth = axes @ (scenes.center_NO3[index, slot].double().numpy() - eye)
            expected = (right / depth / TAN_HALF_FOV, -up / depth / TAN_HALF_FOV, depth)
            assert (node.u, node.v, node.depth) == pytest.approx(expected, abs=1e-4)
            assert node.height == float(scenes.center_NO3[index, slot, 2])
            assert node.pixels == int((rendered.instance_NHW[index] == slot + 1).sum())
            assert node.shape == SHAPES[int(scenes.shape_NO[index, slot])]


def test_a_sphere_appears_where_its_graph_says(scenes: Scenes) -> None:
    one = _with_shape(scenes, "sphere")
    result = render(one, size=SIZE)
    (node,) = scene_graphs(one, result)[0].objects
    rows, columns = np.nonzero(result.instance_NHW[0].numpy() == 1)
    assert (columns.mean() + 0.5) / SIZE * 2 - 1 == pytest.approx(node.u, abs=2 / SIZE)
    assert (rows.mean() + 0.5) / SIZE * 2 - 1 == pytest.approx(node.v, abs=2 / SIZE)


def test_attribute_masks_spread_the_graph_over_the_instances(scenes: Scenes, rendered: Rendered) -> None:
    masks, words = attribute_masks(rendered, scenes), {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
    for index, graph in enumerate(scene_graphs(scenes, rendered)):
        instance = rendered.instance_NHW[index]
        for name, vocabulary in {**words, "material": MATERIALS}.items():
            assert (masks[name][index][instance == 0] == -1).all()
            for slot, node in enumerate(graph.objects):
                assert (masks[name][index][instance == slot + 1] == vocabulary.index(getattr(node, name))).all()


def test_edges_are_outlines_and_creases(scenes: Scenes) -> None:
    ball, cube = (render(_with_shape(scenes, shape), size=SIZE) for shape in ("sphere", "cube"))
    for result, has_crease in ((ball, False), (cube, True)):
        instance, edges = result.instance_NHW[0].numpy(), result.edges_NHW[0].numpy()
        outline = np.zeros_like(edges)
        outline[:, :-1] |= instance[:, 1:] != instance[:, :-1]
        outline[:-1] |= instance[1:] != instance[:-1]
        assert edges[outline].all()
        inner = edges & ~outline
        assert inner.any() == has_crease
        assert not inner[instance == 0].any()


def test_noise_has_the_set_strength_and_differs_between_scenes(scenes: Scenes, rendered: Rendered) -> None:
    clean = render(replace(scenes, world=replace(scenes.world, noise=0.0)), size=SIZE)
    difference = rendered.rgb_NHW3.float() - clean.rgb_NHW3.float()
    unclipped = (clean.rgb_NHW3 > 40) & (clean.rgb_NHW3 < 215)
    assert difference[unclipped].std() / 255 == pytest.approx(scenes.world.noise, rel=0.05)
    assert torch.corrcoef(difference[:2].reshape(2, -1))[0, 1].abs() < 0.05


def test_shiny_objects_look_different_from_matte_ones(scenes: Scenes) -> None:
    clear = replace(scenes, world=replace(scenes.world, noise=0.0))
    for shape in SHAPES:
        one = _with_shape(clear, shape)
        matte, shiny = (
            render(replace(one, material_NO=torch.full_like(one.material_NO, k)), size=SIZE) for k in (0, 1)
        )
        mask = matte.instance_NHW == 1
        change = (shiny.rgb_NHW3[mask].float() - matte.rgb_NHW3[mask].float()).abs().mean()
        assert change > 10  # of 255, ten times the noise of a mean over 4 pixels
        assert torch.equal(matte.rgb_NHW3[~mask], shiny.rgb_NHW3[~mask])


def test_colour_words_can_be_read_off_matte_objects() -> None:
    scenes = sample_scenes(150, seed=4, world=TabletopWorld(shiny_probability=0.0))
    rendered = render(scenes, size=64)
    palette = torch.tensor([COLOUR_RGB[colour] for colour in COLOURS])
    palette = palette / palette.norm(dim=1, keepdim=True)
    right = total = 0
    for index, colours in enumerate(scenes.colour_NO.tolist()):
        for slot, colour in enumerate(colours[: int(scenes.num_objects_N[index])]):
            mean = rendered.rgb_NHW3[index][rendered.instance_NHW[index] == slot + 1].float().mean(dim=0)
            right += int((palette @ mean).argmax()) == colour
            total += 1
    assert right / total > 0.9


def test_fog_pales_what_is_far(scenes: Scenes) -> None:
    clear, foggy = (
        render(replace(scenes, world=replace(scenes.world, noise=0.0, fog=fog)), size=64) for fog in (0.0, 0.2)
    )
    spread = [result.rgb_NHW3[:, :8].float().std() for result in (clear, foggy)]
    assert spread[1] < 0.5 * spread[0]
