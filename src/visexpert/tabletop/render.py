"""Render scenes: colour, depth, normals, instances, edges, attributes and scene graphs.

Camera frame of the outputs: x to the right, y up, z towards the viewer (OpenGL's convention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from visexpert.tabletop.graph import ObjectNode, SceneGraph
from visexpert.tabletop.raycast import (
    Group,
    Hits,
    Rays,
    cast,
    count_instances,
    object_groups,
    object_normals,
    pixel_rays,
    shadowed,
    take,
)
from visexpert.tabletop.scenes import generator
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES, TAN_HALF_FOV, Scenes

CREASE_COSINE = 0.7
"""Normals of neighboring pixels on one object that differ by more than this cosine (45 degrees) form an edge."""

_BATCH = 32  # scenes at a time: fewer cost more calls, more cost more memory
_AMBIENT, _DIFFUSE = 0.48, 0.72
_FOG_RGB = (0.72, 0.76, 0.82)


@dataclass(frozen=True)
class Rendered:
    """Rendered images of N scenes with exact ground truth.

    Args:
        rgb_NHW3: uint8 colour.
        depth_NHW: float32 depth along the optical axis (not along the ray), scene units. The table fills the
            background, so every pixel has a depth.
        normals_NHW3: float32 unit normals in the camera frame: x right, y up, z towards the viewer.
        instance_NHW: uint8, 0 = table, k = object in slot k - 1 of its scene.
        edges_NHW: bool, pixels that differ from their right or lower neighbor: another instance, or a crease in the
            normals of one object. Surfaces are convex, so each jump in depth is a change of instance as well.
    """

    rgb_NHW3: Tensor
    depth_NHW: Tensor
    normals_NHW3: Tensor
    instance_NHW: Tensor
    edges_NHW: Tensor


def render(scenes: Scenes, *, size: int) -> Rendered:
    """Render scenes at ``size`` x ``size`` pixels; a scene's pixels do not depend on the batch around it."""
    rays = pixel_rays(size)
    parts = [_render_batch(scenes.rows(slice(i, i + _BATCH)), rays) for i in range(0, max(len(scenes), 1), _BATCH)]
    return Rendered(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rendered)})


def attribute_masks(rendered: Rendered, scenes: Scenes) -> dict[str, Tensor]:
    """Return the class of every pixel by attribute: int8 (N, H, W) for colour, shape, size, material; -1 = table."""
    return class_masks(
        rendered.instance_NHW,
        {"colour": scenes.colour_NO, "shape": scenes.shape_NO, "size": scenes.size_NO, "material": scenes.material_NO},
    )


def class_masks(instance_NHW: Tensor, attributes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spread each object's class (N, O) over its pixels: int8 (N, H, W), -1 = table."""
    N = len(instance_NHW)
    flat_NP = instance_NHW.reshape(N, -1).long()
    masks = {}
    for name, class_NO in attributes.items():
        with_table = torch.cat([torch.full((N, 1), -1, dtype=torch.int8), class_NO.to(torch.int8)], dim=1)
        masks[name] = with_table.gather(1, flat_NP).view(instance_NHW.shape)
    return masks


def object_table(scenes: Scenes, rendered: Rendered) -> Tensor:
    """Return u, v, depth, height (see :class:`ObjectNode`) and visible pixels of every slot: float32 (N, O, 5)."""
    camera_NO3 = scenes.camera_centers()
    depth_NO = camera_NO3[..., 2]
    u_NO = camera_NO3[..., 0] / (depth_NO * TAN_HALF_FOV)
    v_NO = -camera_NO3[..., 1] / (depth_NO * TAN_HALF_FOV)
    pixels_NO = count_instances(rendered.instance_NHW, scenes.shape_NO.shape[1]).float()
    return torch.stack([u_NO, v_NO, depth_NO, scenes.center_NO3[..., 2], pixels_NO], dim=-1)


def scene_graphs(scenes: Scenes, rendered: Rendered) -> list[SceneGraph]:
    """Return the exact content of each image."""
    class_NO4 = torch.stack([scenes.shape_NO, scenes.colour_NO, scenes.size_NO, scenes.material_NO], dim=-1)
    return build_graphs(class_NO4.tolist(), object_table(scenes, rendered).tolist())


def build_graphs(
    classes: Sequence[Sequence[Sequence[int]]], geometry: Sequence[Sequence[Sequence[float]]]
) -> list[SceneGraph]:
    """Build graphs from (shape, colour, size, material) indices, -1 in empty slots, and :func:`object_table` rows."""
    return [
        SceneGraph(
            objects=tuple(
                ObjectNode(
                    shape=SHAPES[shape],
                    colour=COLOURS[colour],
                    size=SIZES[size],
                    material=MATERIALS[material],
                    u=u,
                    v=v,
                    depth=depth,
                    height=height,
                    pixels=int(pixels),
                )
                for (shape, colour, size, material), (u, v, depth, height, pixels) in zip(slots, rows, strict=True)
                if shape >= 0
            )
        )
        for slots, rows in zip(classes, geometry, strict=True)
    ]


def _render_batch(scenes: Scenes, rays: Rays) -> Rendered:
    groups = object_groups(scenes)
    hits = cast(scenes, groups, rays)
    seen_M, normal_3M = object_normals(scenes, groups, hits, rays)
    normals_3NHW = _paint(scenes.axes_N33[:, :, 2], seen_M, normal_3M, len(rays.x_W))
    radiance_3NHW = _shade(scenes, groups, hits, rays, seen_M, normal_3M)
    normals_NHW3 = torch.stack([normals_3NHW[0], normals_3NHW[1], -normals_3NHW[2]], dim=-1)
    return Rendered(
        rgb_NHW3=_expose(radiance_3NHW, scenes),
        depth_NHW=hits.depth_NHW,
        normals_NHW3=normals_NHW3,
        instance_NHW=hits.instance_NHW,
        edges_NHW=_edges(hits.instance_NHW, normals_3NHW),
    )


def _shade(scenes: Scenes, groups: list[Group], hits: Hits, rays: Rays, seen_M: Tensor, normal_3M: Tensor) -> Tensor:
    """Return linear colour (3, N, H, W) before noise: diffuse light, hard shadows, gloss on shiny objects, fog."""
    size, P = len(rays.x_W), rays.xyz_3P.shape[1]
    scene_M = seen_M // P
    slot_M = scene_M * scenes.shape_NO.shape[1] + take(hits.instance_NHW.view(-1), seen_M).long() - 1
    up_3N = scenes.axes_N33[:, :, 2].T.contiguous()
    light_3N = _sum3((scenes.axes_N33 * scenes.light_N3[:, None, :]).permute(2, 1, 0))
    up_3M, light_3M = take(up_3N, scene_M), take(light_3N, scene_M)

    facing_NHW = _paint(_sum3(up_3N * light_3N)[:, None], seen_M, _sum3(normal_3M * light_3M)[None], size)[0]
    shade_NHW = shadowed(scenes, groups, hits, rays, facing_NHW > 0)
    direct_NHW = torch.where(shade_NHW, 0.0, facing_NHW.clamp(min=0.0)) * scenes.brightness_N[:, None, None]
    upward_NHW = _paint(torch.ones(len(scenes), 1), seen_M, _sum3(normal_3M * up_3M)[None], size)[0]
    albedo_3M = take(scenes.albedo_NO3.reshape(-1, 3).T, slot_M)
    radiance_3NHW = _paint(scenes.table_N3, seen_M, albedo_3M, size)
    radiance_3NHW *= _AMBIENT * (0.75 + 0.25 * upward_NHW) + _DIFFUSE * direct_NHW

    shiny = take(scenes.material_NO.view(-1), slot_M) == 1
    shiny_M = seen_M[shiny]
    gloss_3M, share_M = _gloss(
        normal_3M[:, shiny],
        take(rays.xyz_3P, shiny_M % P),
        light_3M[:, shiny],
        up_3M[:, shiny],
        take(shade_NHW.view(-1), shiny_M),
    )
    flat_3Q = radiance_3NHW.view(3, -1)
    flat_3Q.scatter_(1, shiny_M.expand(3, -1), take(flat_3Q, shiny_M) * (1.0 - share_M) + gloss_3M)

    thickness_NHW = hits.depth_NHW * scenes.world.fog
    clear_NHW = 1.0 / (1.0 + thickness_NHW * thickness_NHW)
    fog_3111 = torch.tensor(_FOG_RGB)[:, None, None, None]
    return radiance_3NHW * clear_NHW + fog_3111 * (1.0 - clear_NHW)


def _paint(table_NC: Tensor, seen_M: Tensor, value_CM: Tensor, size: int) -> Tensor:
    """Fill images (C, N, H, W) with a value per scene for the table, then the values of the pixels that see objects."""
    N, C = table_NC.shape
    image_CNHW = table_NC.T[:, :, None, None].expand(C, N, size, size).contiguous()
    image_CNHW.view(C, -1).scatter_(1, seen_M.expand(C, -1), value_CM)
    return image_CNHW


def _gloss(
    normal_3M: Tensor, ray_3M: Tensor, light_3M: Tensor, up_3M: Tensor, shade_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a polished surface reflects (3, M) and the share of its own colour that this replaces (M)."""
    view_3M = -ray_3M / torch.sqrt(_sum3(ray_3M * ray_3M))
    facing_M = _sum3(normal_3M * view_3M).clamp(min=0.0)
    mirror_3M = 2.0 * facing_M * normal_3M - view_3M
    highlight_M = _sum3(mirror_3M * light_3M).clamp(min=0.0)
    for _ in range(4):  # to the 16th power by squaring; a power function may round differently from place to place
        highlight_M = highlight_M * highlight_M
    highlight_M = torch.where(shade_M, 0.0, highlight_M)
    # The surface reflects a room with a bright ceiling and a dark floor, so that flat faces are glossy, too.
    ceiling_M = (0.15 + 1.6 * _sum3(mirror_3M * up_3M)).clamp(0.0, 1.0)
    grazing_M = 1.0 - facing_M
    share_M = 0.34 + 0.45 * grazing_M * grazing_M
    return (share_M * ceiling_M + 0.9 * highlight_M).expand(3, -1), share_M


def _expose(radiance_3NHW: Tensor, scenes: Scenes) -> Tensor:
    """Add each scene's own pixel noise and round to uint8 (N, H, W, 3)."""
    image_NHW3 = radiance_3NHW.permute(1, 2, 3, 0).contiguous()
    if scenes.world.noise > 0:
        keys = scenes.key_N2.numpy().view(np.uint64)
        shape = tuple(image_NHW3.shape[1:])
        noise = np.stack([generator(key, 1).standard_normal(shape, dtype=np.float32) for key in keys])
        image_NHW3 = image_NHW3 + torch.from_numpy(noise) * scenes.world.noise
    return (image_NHW3 * 255.0 + 0.5).clamp(0.0, 255.0).to(torch.uint8)


def _edges(instance_NHW: Tensor, normals_3NHW: Tensor) -> Tensor:
    edges_NHW = torch.zeros_like(instance_NHW, dtype=torch.bool)
    right = _sum3(normals_3NHW[..., 1:] * normals_3NHW[..., :-1]) < CREASE_COSINE
    below = _sum3(normals_3NHW[..., 1:, :] * normals_3NHW[..., :-1, :]) < CREASE_COSINE
    edges_NHW[..., :-1] |= right | (instance_NHW[..., 1:] != instance_NHW[..., :-1])
    edges_NHW[..., :-1, :] |= below | (instance_NHW[..., 1:, :] != instance_NHW[..., :-1, :])
    return edges_NHW


def _sum3(value_3X: Tensor) -> Tensor:
    return value_3X[0] + value_3X[1] + value_3X[2]
