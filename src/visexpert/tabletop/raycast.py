"""Exact ray casting of spheres, cubes and cylinders on a table, batched over scenes.

Each object is an affine image of a unit shape (unit ball, cube [-1, 1]^3, cylinder of radius 1 and half height 1), so a
ray maps to a ray with the same parameter, and each convex shape needs one function: the interval of the ray inside it.
A bounding-sphere test is dense over objects and pixels; the exact test runs only where that one passes.

Camera frame: right, up, forward. Rays are (x, y, 1), so that their parameter is the depth along the optical axis.

Only additions, products, divisions, square roots and comparisons are used, elementwise: they round the same way
wherever an element lies in a tensor, which makes a scene's pixels independent of the batch it is rendered in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visexpert.tabletop.world import SHAPE_HALF_EXTENT, SHAPES, SIZE_RADIUS, SIZES, TAN_HALF_FOV, Scenes

_SLACK = 1.01  # of the squared bounding radius, so that rounding never cuts a silhouette
_SMALL = 1e-9


@dataclass(frozen=True)
class Rays:
    """The pixel grid: the ray of pixel (i, j) is (x_W[j], y_H[i], 1), through the pixel's center.

    Args:
        x_W: Rightward part of each column's rays.
        y_H: Upward part of each row's rays.
        norm2_HW: Squared length of each ray.
        xyz_3P: All rays, pixels in row-major order.
    """

    x_W: Tensor
    y_H: Tensor
    norm2_HW: Tensor
    xyz_3P: Tensor


@dataclass(frozen=True)
class Group:
    """All objects of one shape in a batch of scenes, K of them, in the camera frame.

    Args:
        shape: Index into ``SHAPES``.
        scene_K: int64 scene of each object.
        slot_K: int64 slot of each object in its scene.
        center_3K: Center.
        bound2_K: Squared radius of the bounding sphere.
        to_unit_33K: Matrix (row, column, object) that maps camera-frame offsets from the center to the unit shape.
    """

    shape: int
    scene_K: Tensor
    slot_K: Tensor
    center_3K: Tensor
    bound2_K: Tensor
    to_unit_33K: Tensor


@dataclass(frozen=True)
class Hits:
    """The first surface that each pixel's ray hits.

    Args:
        depth_NHW: float32 depth along the optical axis.
        instance_NHW: uint8, 0 = table, k = object in slot k - 1.
    """

    depth_NHW: Tensor
    instance_NHW: Tensor


def visible_pixels(scenes: Scenes, *, size: int, batch: int = 32) -> Tensor:
    """Count each object's visible pixels at ``size`` x ``size``: int64 (N, O), 0 in empty slots."""
    num_slots = scenes.shape_NO.shape[1]
    counts = []
    for start in range(0, len(scenes), batch):
        part = scenes.rows(slice(start, start + batch))
        counts.append(count_instances(cast(part, object_groups(part), pixel_rays(size)).instance_NHW, num_slots))
    return torch.cat(counts) if counts else torch.zeros(0, num_slots, dtype=torch.int64)


def count_instances(instance_NHW: Tensor, num_slots: int) -> Tensor:
    """Count the pixels of each slot's object: int64 (N, O)."""
    N = len(instance_NHW)
    flat_NP = instance_NHW.reshape(N, -1).long() + torch.arange(N)[:, None] * (num_slots + 1)
    return torch.bincount(flat_NP.reshape(-1), minlength=N * (num_slots + 1)).reshape(N, -1)[:, 1:]


def pixel_rays(size: int) -> Rays:
    """Return the rays of a ``size`` x ``size`` image."""
    center = (torch.arange(size, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x_W, y_H = center * TAN_HALF_FOV, -center * TAN_HALF_FOV
    x_HW, y_HW = x_W.expand(size, size), y_H[:, None].expand(size, size)
    return Rays(
        x_W=x_W,
        y_H=y_H,
        norm2_HW=x_HW * x_HW + y_HW * y_HW + 1.0,
        xyz_3P=torch.stack([x_HW, y_HW, torch.ones(size, size)]).reshape(3, -1),
    )


def object_groups(scenes: Scenes) -> list[Group]:
    """Gather the objects of a batch of scenes by shape; shapes that do not occur are left out."""
    center_NO3 = scenes.camera_centers()
    right, up, forward = scenes.axes_N33.unbind(1)
    yaw_NO = scenes.yaw_NO.double()
    cos_NO, sin_NO = torch.cos(yaw_NO).float(), torch.sin(yaw_NO).float()
    groups = []
    for shape, name in enumerate(SHAPES):
        scene_K, slot_K = torch.nonzero(scenes.shape_NO == shape, as_tuple=True)
        if not len(scene_K):
            continue
        radius_K = torch.tensor([SIZE_RADIUS[size] for size in SIZES])[scenes.size_NO[scene_K, slot_K]]
        half = SHAPE_HALF_EXTENT[name]
        # Columns of the camera axes hold world x, y and z as the camera sees them; yaw turns the first two.
        world_333 = torch.stack([right[scene_K], up[scene_K], forward[scene_K]]).permute(2, 0, 1)
        cos_K, sin_K = cos_NO[scene_K, slot_K], sin_NO[scene_K, slot_K]
        axis_x = world_333[0] * cos_K + world_333[1] * sin_K
        axis_y = world_333[1] * cos_K - world_333[0] * sin_K
        rows = [axis / (extent * radius_K) for axis, extent in zip((axis_x, axis_y, world_333[2]), half, strict=True)]
        groups.append(
            Group(
                shape=shape,
                scene_K=scene_K,
                slot_K=slot_K,
                center_3K=center_NO3[scene_K, slot_K].T.contiguous(),
                bound2_K=radius_K * radius_K * (_BOUND2[shape](half)),
                to_unit_33K=torch.stack(rows),
            )
        )
    return groups


def cast(scenes: Scenes, groups: list[Group], rays: Rays) -> Hits:
    """Find the first surface along each pixel's ray."""
    size, P = len(rays.x_W), rays.xyz_3P.shape[1]
    depth_NHW = table_depth(scenes, rays)
    depth_Q = depth_NHW.view(-1)
    crossings = []
    for group in groups:
        along_KHW = _along(group.center_3K, rays)
        center2_K = _dot(group.center_3K, group.center_3K)
        limit_KHW = rays.norm2_HW * (center2_K - group.bound2_K * _SLACK)[:, None, None]
        near_M = torch.nonzero((along_KHW * along_KHW > limit_KHW).reshape(-1)).squeeze(1)
        object_M, pixel_M = near_M // P, near_M % P
        origin_3K = -_apply(group.to_unit_33K, group.center_3K)
        direction_3M = _apply(take(group.to_unit_33K, object_M), take(rays.xyz_3P, pixel_M))
        enter_M, leave_M = _INTERVAL[group.shape](take(origin_3K, object_M), direction_3M)
        enter_M = torch.where(enter_M < leave_M, enter_M, torch.inf)
        target_M = take(group.scene_K, object_M) * P + pixel_M
        depth_Q.scatter_reduce_(0, target_M, enter_M, "amin")
        crossings.append((target_M, enter_M, take(group.slot_K + 1, object_M)))
    instance_Q = torch.zeros(len(depth_Q), dtype=torch.uint8)
    for target_M, enter_M, number_M in crossings:
        first_M = enter_M == take(depth_Q, target_M)
        instance_Q[target_M[first_M]] = number_M[first_M].to(torch.uint8)
    return Hits(depth_NHW=depth_NHW, instance_NHW=instance_Q.view(-1, size, size))


def table_depth(scenes: Scenes, rays: Rays) -> Tensor:
    """Return the depth (N, H, W) of the table z = 0; the camera always looks down far enough to meet it."""
    up_N3 = scenes.axes_N33[:, :, 2]  # the world's vertical in the camera frame
    slope_NHW = (up_N3[:, 1:2] * rays.y_H)[:, :, None] + (up_N3[:, 0:1] * rays.x_W + up_N3[:, 2:3])[:, None, :]
    return -scenes.eye_N3[:, 2, None, None] / slope_NHW


def object_normals(scenes: Scenes, groups: list[Group], hits: Hits, rays: Rays) -> tuple[Tensor, Tensor]:
    """Return the flat pixels (into N x H x W) that show objects, and their camera-frame unit normals (3, M)."""
    P, num_slots = rays.xyz_3P.shape[1], scenes.shape_NO.shape[1]
    instance_Q, depth_Q = hits.instance_NHW.view(-1), hits.depth_NHW.view(-1)
    seen_M = torch.nonzero(instance_Q).squeeze(1)
    object_M = (seen_M // P) * num_slots + take(instance_Q, seen_M).long() - 1
    shape_M = take(scenes.shape_NO.reshape(-1), object_M)
    order, normals = [], []
    for group in groups:
        row_of = torch.zeros(scenes.shape_NO.numel(), dtype=torch.int64)
        row_of[group.scene_K * num_slots + group.slot_K] = torch.arange(len(group.scene_K))
        mine = shape_M == group.shape
        pixel_M, row_M = seen_M[mine], take(row_of, object_M[mine])
        point_3M = take(rays.xyz_3P, pixel_M % P) * take(depth_Q, pixel_M) - take(group.center_3K, row_M)
        matrix_33M = take(group.to_unit_33K, row_M)
        unit_3M = _UNIT_NORMAL[group.shape](_apply(matrix_33M, point_3M))
        # Normals go back by the transpose of the map that brought the points.
        normal_3M = _apply(matrix_33M.transpose(0, 1), unit_3M)
        order.append(pixel_M)
        normals.append(normal_3M / torch.sqrt(_dot(normal_3M, normal_3M)))
    if not order:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(3, 0)
    return torch.cat(order), torch.cat(normals, dim=1)


def shadowed(scenes: Scenes, groups: list[Group], hits: Hits, rays: Rays, facing_NHW: Tensor) -> Tensor:
    """Return which pixels see a surface that another object shades from the light: bool (N, H, W).

    Args:
        scenes: The scenes.
        groups: Their objects.
        hits: What the pixels see.
        rays: The pixel grid.
        facing_NHW: bool, pixels whose surface faces the light; others are not tested.
    """
    N, H, W = hits.depth_NHW.shape
    light_3N = _apply(scenes.axes_N33.permute(1, 2, 0), scenes.light_N3.T)
    depth_Q, facing_NP, instance_NP = hits.depth_NHW.view(-1), facing_NHW.view(N, -1), hits.instance_NHW.view(N, -1)
    light_NHW = _along(light_3N, rays) * hits.depth_NHW
    length2_NHW = rays.norm2_HW * hits.depth_NHW * hits.depth_NHW
    shade_Q = torch.zeros(N * H * W, dtype=torch.bool)
    for group in groups:
        scene_K = group.scene_K
        light_3K = take(light_3N, scene_K)
        offset_KP = (light_NHW.index_select(0, scene_K) - _dot(group.center_3K, light_3K)[:, None, None]).view(
            -1, H * W
        )
        across_KHW = length2_NHW.index_select(0, scene_K)
        across_KHW -= 2.0 * hits.depth_NHW.index_select(0, scene_K) * _along(group.center_3K, rays)
        limit_K = group.bound2_K * _SLACK - _dot(group.center_3K, group.center_3K)
        near_KP = offset_KP * offset_KP > across_KHW.view(-1, H * W) - limit_K[:, None]
        # The object must lie ahead on the way to the light, and a convex object never shades its own lit side.
        near_KP &= (offset_KP < torch.sqrt(group.bound2_K)[:, None]) & facing_NP.index_select(0, scene_K)
        near_KP &= instance_NP.index_select(0, scene_K) != (group.slot_K + 1)[:, None]
        near_M = torch.nonzero(near_KP.reshape(-1)).squeeze(1)
        object_M, pixel_M = near_M // (H * W), near_M % (H * W)
        target_M = take(scene_K, object_M) * (H * W) + pixel_M
        point_3M = take(rays.xyz_3P, pixel_M) * take(depth_Q, target_M) - take(group.center_3K, object_M)
        origin_3M = _apply(take(group.to_unit_33K, object_M), point_3M)
        direction_3M = take(_apply(group.to_unit_33K, light_3K), object_M)
        enter_M, leave_M = _INTERVAL[group.shape](origin_3M, direction_3M)
        shade_Q[target_M[(enter_M < leave_M) & (leave_M > 0)]] = True
    return shade_Q.view(N, H, W)


def take(values: Tensor, index_M: Tensor) -> Tensor:
    """Gather along the last dimension; several times faster than ``values[..., index_M]``."""
    return values.reshape(-1, values.shape[-1]).index_select(1, index_M).view(*values.shape[:-1], len(index_M))


def _along(vector_3K: Tensor, rays: Rays) -> Tensor:
    """Return the dot product of each vector with each ray: (K, H, W)."""
    by_column_KW = vector_3K[0][:, None] * rays.x_W + vector_3K[2][:, None]
    return by_column_KW[:, None, :] + (vector_3K[1][:, None] * rays.y_H)[:, :, None]


def _apply(matrix_33M: Tensor, vector_3M: Tensor) -> Tensor:
    return torch.stack([_dot(row_3M, vector_3M) for row_3M in matrix_33M])


def _dot(a_3M: Tensor, b_3M: Tensor) -> Tensor:
    return a_3M[0] * b_3M[0] + a_3M[1] * b_3M[1] + a_3M[2] * b_3M[2]


def _ball_interval(origin_3M: Tensor, direction_3M: Tensor) -> tuple[Tensor, Tensor]:
    """Return parameters at which rays enter and leave the unit ball; enter = inf, leave = -inf where they miss it."""
    length2_M = _dot(direction_3M, direction_3M)
    middle_M = -_dot(origin_3M, direction_3M) / length2_M
    closest_3M = origin_3M + middle_M * direction_3M
    return _chord(middle_M, 1.0 - _dot(closest_3M, closest_3M), length2_M)


def _cube_interval(origin_3M: Tensor, direction_3M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for the cube [-1, 1]^3."""
    safe_3M = torch.where(direction_3M.abs() < _SMALL, _SMALL, direction_3M)
    first_3M, second_3M = (-1.0 - origin_3M) / safe_3M, (1.0 - origin_3M) / safe_3M
    return torch.minimum(first_3M, second_3M).amax(dim=0), torch.maximum(first_3M, second_3M).amin(dim=0)


def _cylinder_interval(origin_3M: Tensor, direction_3M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for the cylinder of radius 1 about the third axis between -1 and 1."""
    length2_M = (direction_3M[0] * direction_3M[0] + direction_3M[1] * direction_3M[1]).clamp(min=_SMALL)
    middle_M = -(origin_3M[0] * direction_3M[0] + origin_3M[1] * direction_3M[1]) / length2_M
    x_M, y_M = origin_3M[0] + middle_M * direction_3M[0], origin_3M[1] + middle_M * direction_3M[1]
    enter_M, leave_M = _chord(middle_M, 1.0 - (x_M * x_M + y_M * y_M), length2_M)
    cap_enter_M, cap_leave_M = _cube_interval(origin_3M[2:], direction_3M[2:])
    return torch.maximum(enter_M, cap_enter_M), torch.minimum(leave_M, cap_leave_M)


def _chord(middle_M: Tensor, inside2_M: Tensor, length2_M: Tensor) -> tuple[Tensor, Tensor]:
    half_M = torch.sqrt(inside2_M.clamp(min=0.0) / length2_M)
    missed = inside2_M <= 0
    return torch.where(missed, torch.inf, middle_M - half_M), torch.where(missed, -torch.inf, middle_M + half_M)


def _cube_normal(point_3M: Tensor) -> Tensor:
    face_M = point_3M.abs().argmax(dim=0)
    return torch.where(torch.arange(3)[:, None] == face_M, torch.sign(point_3M), 0.0)


def _cylinder_normal(point_3M: Tensor) -> Tensor:
    x_M, y_M, z_M = point_3M
    cap_M = z_M * z_M > x_M * x_M + y_M * y_M
    zero_M = torch.zeros_like(x_M)
    return torch.where(cap_M, torch.stack([zero_M, zero_M, z_M]), torch.stack([x_M, y_M, zero_M]))


def _ball_normal(point_3M: Tensor) -> Tensor:
    return point_3M


_Interval = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_INTERVAL: tuple[_Interval, ...] = (_ball_interval, _cube_interval, _cylinder_interval)
_UNIT_NORMAL: tuple[Callable[[Tensor], Tensor], ...] = (_ball_normal, _cube_normal, _cylinder_normal)
_BOUND2: tuple[Callable[[tuple[float, float, float]], float], ...] = (
    lambda half: half[0] ** 2,
    lambda half: half[0] ** 2 + half[1] ** 2 + half[2] ** 2,
    lambda half: half[0] ** 2 + half[2] ** 2,
)
"""Squared bounding radius of each shape from its half extents."""
