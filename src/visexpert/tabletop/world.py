"""The embedded world: its vocabulary, its settings, and the form of its scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from torch import Tensor

from visexpert.errors import ConfigError

SHAPES = ("sphere", "cube", "cylinder")
COLOURS = ("red", "blue", "green", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "medium", "large")
MATERIALS = ("matte", "shiny")

COLOUR_RGB: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "blue": (0.10, 0.22, 0.85),
    "green": (0.10, 0.58, 0.14),
    "yellow": (0.93, 0.84, 0.10),
    "purple": (0.52, 0.14, 0.68),
    "cyan": (0.10, 0.78, 0.82),
    "orange": (0.96, 0.48, 0.06),
    "white": (0.96, 0.96, 0.94),
}
"""Albedo of each colour word, linear 0-1."""

SIZE_RADIUS: Mapping[str, float] = {"small": 0.34, "medium": 0.50, "large": 0.72}
"""Radius of the sphere of each size class, scene units; cubes and cylinders of a class have the same volume."""

SHAPE_HALF_EXTENT: Mapping[str, tuple[float, float, float]] = {
    "sphere": (1.0, 1.0, 1.0),
    "cube": (0.806, 0.806, 0.806),
    "cylinder": (0.78, 0.78, 1.096),
}
"""Half extent (x, y, height) of each shape relative to the radius of its size class: equal volume, 4/3 pi r^3."""

TAN_HALF_FOV = 0.364
"""Tangent of half the camera's field of view (20 degrees), the same horizontally and vertically."""

RENDERER_VERSION = 1
"""Increase it whenever the same settings and seed give other pixels or scenes, so that no stale cache is used."""


@dataclass(frozen=True)
class TabletopWorld:
    """Settings of the scenes and their rendering.

    Args:
        image_size: Height and width of the cached renders, pixels.
        min_objects: Fewest objects in a scene (at least 1).
        max_objects: Most objects in a scene (at most 6); the number is uniform between the two.
        unique_colours: No two objects of a scene share a colour; if false, only (colour, shape) pairs are unique.
        colour_skew: Prior of a colour word relative to the word before it in ``COLOURS`` (1 = uniform).
        shape_skew: The same for ``SHAPES``.
        shiny_probability: Chance that an object is shiny.
        float_probability: Chance that an object hovers above the table instead of standing on it. Hovering breaks
            the rule "lower in the image is nearer", so that front and behind require real depth.
        camera_jitter: Scale of the random camera pose, 0 (fixed) to 1.
        light_jitter: Scale of the random light direction and strength, 0 (fixed) to 1.
        fog: Density of the fog per scene unit (0 = clear).
        noise: Standard deviation of the pixel noise, 0-1 scale.
    """

    image_size: int = 96
    min_objects: int = 2
    max_objects: int = 5
    unique_colours: bool = True
    colour_skew: float = 0.8
    shape_skew: float = 0.75
    shiny_probability: float = 0.5
    float_probability: float = 0.5
    camera_jitter: float = 1.0
    light_jitter: float = 1.0
    fog: float = 0.035
    noise: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= 6:
            raise ConfigError(
                f"TabletopWorld needs 1 <= min_objects <= max_objects <= 6, but got min_objects={self.min_objects} "
                f"and max_objects={self.max_objects}; change one of them."
            )
        limits = {
            "image_size": (16, 1024),
            "colour_skew": (0.1, 1.0),
            "shape_skew": (0.1, 1.0),
            "shiny_probability": (0.0, 1.0),
            "float_probability": (0.0, 1.0),
            "camera_jitter": (0.0, 1.0),
            "light_jitter": (0.0, 1.0),
            "fog": (0.0, 1.0),
            "noise": (0.0, 0.5),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"TabletopWorld.{name} is {value}, but must be in [{low}, {high}].")

    @property
    def colour_prior(self) -> tuple[float, ...]:
        """Probability of each colour word for a scene's first object, in the order of ``COLOURS``."""
        return _geometric(self.colour_skew, len(COLOURS))

    @property
    def shape_prior(self) -> tuple[float, ...]:
        """Probability of each shape for a scene's first object, in the order of ``SHAPES``."""
        return _geometric(self.shape_skew, len(SHAPES))

    def fingerprint(self) -> str:
        """Return 12 hex digits that change with any setting and with the renderer's version."""
        content = json.dumps({"renderer": RENDERER_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; O = ``world.max_objects`` slots, the first ``num_objects_N`` of each are filled.

    Args:
        world: The world that the scenes belong to.
        num_objects_N: int64 number of objects.
        shape_NO: int64 index into ``SHAPES``, -1 in empty slots.
        colour_NO: int64 index into ``COLOURS``, -1 in empty slots.
        size_NO: int64 index into ``SIZES``, -1 in empty slots.
        material_NO: int64 index into ``MATERIALS``, -1 in empty slots.
        center_NO3: float32 center of each object, world frame.
        yaw_NO: float32 rotation about the vertical, radians.
        albedo_NO3: float32 actual colour, linear 0-1: the colour word's, slightly varied.
        eye_N3: float32 position of the camera.
        axes_N33: float32 rows right, up and forward of the camera, orthonormal.
        light_N3: float32 unit vector towards the light.
        brightness_N: float32 strength of the light.
        table_N3: float32 colour of the table.
        key_N2: int64 key of each scene's random stream (pixel noise continues it).
    """

    world: TabletopWorld
    num_objects_N: Tensor
    shape_NO: Tensor
    colour_NO: Tensor
    size_NO: Tensor
    material_NO: Tensor
    center_NO3: Tensor
    yaw_NO: Tensor
    albedo_NO3: Tensor
    eye_N3: Tensor
    axes_N33: Tensor
    light_N3: Tensor
    brightness_N: Tensor
    table_N3: Tensor
    key_N2: Tensor

    def __len__(self) -> int:
        return self.num_objects_N.shape[0]

    def rows(self, index: slice | Sequence[int]) -> Scenes:
        """Return the scenes at ``index``."""
        chosen = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "world"}
        return replace(self, **chosen)

    def camera_centers(self) -> Tensor:
        """Return the objects' centers in the camera frame (right, up, forward), float32 (N, O, 3)."""
        offset_NO3 = self.center_NO3 - self.eye_N3[:, None]
        # Summed by hand: a matrix product may round differently from one batch size to the next.
        terms = offset_NO3[:, :, None, :] * self.axes_N33[:, None, :, :]
        return terms[..., 0] + terms[..., 1] + terms[..., 2]


def _geometric(ratio: float, count: int) -> tuple[float, ...]:
    weights = [ratio**k for k in range(count)]
    return tuple(weight / sum(weights) for weight in weights)
