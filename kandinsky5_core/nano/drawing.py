"""Drawn clips and pictures of the Nano language: one coloured shape that moves over a plain background.

A clip is described by a `Scene` and drawn with anti-aliased edges, so that positions are continuous.
Frames are (F, H, W, 3) float in [0, 1]; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .edits import Edit, apply, random_edit
from .language import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZES, TAUGHT_COLORS, Scene

SUBSAMPLING = 3
"""Samples per pixel along each axis for the anti-aliased edge."""

RADIUS = {"small": (6.0, 7.5), "big": (10.0, 12.0)}
"""Half extent in pixels of a 64-pixel frame."""

STAR_RADIUS, STAR_DEPTH = 1.8, 0.45
"""Of a star, for teaching the models a new shape: its outer radius in radii, and its inner one as a share of that."""

TRAVEL = (16.0, 26.0)
"""Pixels of a 64-pixel frame that a moving shape covers in one clip."""


@dataclass(frozen=True)
class Trajectory:
    """Centre (x, y) in pixels of the first frame and of the last, and half extent in pixels."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: float


def random_scene(rng: random.Random) -> Scene:
    """A scene uniformly from all combinations; a third of the clips stand still a little less often than they move."""
    return Scene(
        size=rng.choice(SIZES),
        color=rng.choice(list(COLORS)),
        shape=rng.choice(SHAPES),
        direction=rng.choice(DIRECTIONS) if rng.random() < 0.85 else None,
        background=rng.choice(list(BACKGROUNDS)),
    )


def random_trajectory(scene: Scene, rng: random.Random, size: tuple[int, int]) -> Trajectory:
    """Where the shape runs so that it stays inside the frame; lengths go by the frame's shorter side."""
    unit = min(size) / 64
    radius = rng.uniform(*RADIUS[scene.size or rng.choice(SIZES)]) * unit
    margin = radius * (STAR_RADIUS if scene.shape == "star" else 1.0) + 1.0
    travel = min(rng.uniform(*TRAVEL) * unit, min(size) - 2 * margin)
    delta_x = {"left": -travel, "right": travel}.get(scene.direction or "", 0.0)
    delta_y = {"up": -travel, "down": travel}.get(scene.direction or "", 0.0)
    start = tuple(
        rng.uniform(margin + max(0.0, -delta), side - margin - max(0.0, delta))
        for delta, side in ((delta_x, size[1]), (delta_y, size[0]))
    )
    return Trajectory(start=start, end=(start[0] + delta_x, start[1] + delta_y), radius=radius)  # type: ignore[arg-type]


def _coverage(shape: str | None, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """1 inside the shape, for offsets (x, y) from its centre in pixels, y downwards."""
    if shape is None:
        return torch.zeros(torch.broadcast_shapes(x.shape, y.shape))
    if shape == "circle":
        return (x * x + y * y <= radius * radius).float()
    if shape == "square":
        half = radius * 0.886  # the area of the circle of that radius
        return ((x.abs() <= half) & (y.abs() <= half)).float()
    if shape == "triangle":
        # Equilateral, pointing up, its centroid at the origin, with the circumradius a little larger so that
        # it does not look smaller than the others.
        circumradius = radius * 1.2
        bottom = circumradius / 2
        return ((y <= bottom) & (y >= -circumradius + 3**0.5 * x.abs())).float()
    if shape == "star":
        return _star(x, y, radius * STAR_RADIUS)
    raise ValueError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}, and star, which the models do not know")


def _star(x: Tensor, y: Tensor, outer: float) -> Tensor:
    """Five points, the first upwards."""
    half = math.pi / 5
    angle = (torch.atan2(x, -y) + half) % (2 * half) - half
    angle = angle.abs()  # from the nearest point, 0 to 36 degrees
    inner = outer * STAR_DEPTH
    edge = outer * inner * math.sin(half) / (inner * torch.sin(half - angle) + outer * torch.sin(angle))
    return ((x * x + y * y).sqrt() <= edge).float()


def draw(scene: Scene, trajectory: Trajectory, num_frames: int, size: tuple[int, int]) -> Tensor:
    """The clip, (F, H, W, 3) in [0, 1]."""
    rows, columns = (
        torch.arange(side * SUBSAMPLING, dtype=torch.float32).add_(0.5).div_(SUBSAMPLING) for side in size
    )
    progress = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.tensor([0.5])
    centre_x = trajectory.start[0] + progress * (trajectory.end[0] - trajectory.start[0])
    centre_y = trajectory.start[1] + progress * (trajectory.end[1] - trajectory.start[1])
    x = columns[None, None, :] - centre_x[:, None, None]
    y = rows[None, :, None] - centre_y[:, None, None]
    fine = _coverage(scene.shape, x, y, trajectory.radius)
    coverage = torch.nn.functional.avg_pool2d(fine[:, None], SUBSAMPLING)[:, 0, :, :, None]
    color = torch.tensor({**COLORS, **TAUGHT_COLORS}[scene.color]) / 255
    background = torch.tensor(BACKGROUNDS[scene.background]) / 255
    return background + coverage * (color - background)


def random_clip(rng: random.Random, num_frames: int, size: tuple[int, int]) -> tuple[Scene, Tensor]:
    """A random scene and its frames."""
    scene = random_scene(rng)
    return scene, draw(scene, random_trajectory(scene, rng, size), num_frames, size)


def random_pair(rng: random.Random, size: tuple[int, int]) -> tuple[Scene, Edit, Tensor, Tensor]:
    """A random scene standing still, an edit of it, and both pictures (H, W, 3)."""
    scene = replace(random_scene(rng), direction=None)
    edit = random_edit(scene, rng)
    trajectory = random_trajectory(scene, rng, size)
    before, after = (draw(shown, trajectory, 1, size)[0] for shown in (scene, apply(scene, edit)))
    return scene, edit, before, after
