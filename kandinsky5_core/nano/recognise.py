"""Says what a clip or picture of the Nano language shows, by plain image processing; no network is involved.

Frames are (F, H, W, 3) in [0, 1]. Lengths are fractions of the frame's shorter side, so any size can be judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import STAR_DEPTH, STAR_RADIUS, Trajectory, draw
from .language import BACKGROUNDS, COLORS, TAUGHT_COLORS, TAUGHT_SHAPES, Scene

FOREGROUND = 0.25
"""RGB distance from the background, of sqrt(3), above which a pixel may belong to the shape."""
MAX_COLOR_DISTANCE = 0.35
"""A named colour must be at least this near."""
MIN_AREA, MAX_AREA = 0.004, 0.5
"""What a shape covers, in square sides."""
AREAS = {"circle": math.pi, "square": (2 * 0.886) ** 2, "triangle": 0.75 * 3**0.5 * 1.2**2}
"""In square radii, as `drawing` draws them."""
MATCH = 0.75
"""Overlap over union with an ideal shape of the same centre and area; the worst drawn ones have 0.78 after the VAE."""
CLEARLY = 0.1
"""By so much more does another shape overlap where skewness and filling are misled: small shapes, few pixels."""
TRACE = 0.12
"""RGB distance from the background, of sqrt(3), that is more than unevenness: fainter remains are nothing."""
REACH = 1.3
"""Every shape ends this many extents from its centre, blur included (a triangle's corner: 0.88)."""
MOVED, STILL = 0.10, 0.06
"""Way of the centre, in sides, from which a shape counts as moving, and up to which as still."""
STRAIGHT = 2.0
"""The way along one axis is at least this many times that along the other."""
SQUARE_FILL = 0.855
"""Share of its bounding box that a square fills at least (sharp: 1); a circle fills 0.79."""
TRIANGLE_SKEW = -0.13
"""Vertical skewness below which a shape is wide at the bottom: -0.56 for a sharp triangle, 0 for the others."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What was recognised; None where nothing known was."""

    color: str | None
    shape: str | None
    motion: str | None
    """'left', 'right', 'up', 'down' or 'still'."""
    background: str | None
    path: tuple[tuple[float, float], ...] = ()
    """Centre (x, y) of each frame, in sides."""
    extent: float | None = None
    """Square root of the shape's area, in sides."""
    color_rgb: tuple[float, ...] = ()
    background_rgb: tuple[float, ...] = ()
    """The measured colours, 0 to 1."""
    stray_area: float = 0.0
    """Of what is on the background beside the shape, in square sides; the largest of all frames."""
    is_empty: bool = False
    """Nothing on the background, not even a trace."""

    @property
    def radius(self) -> float | None:
        """Half extent as the drawing program counts it, in sides: the same for all shapes of one size."""
        return None if self.shape is None or self.extent is None else self.extent / area_of(self.shape) ** 0.5


def recognise(frames: Tensor, *, taught: tuple[str, ...] = ()) -> Sighting:
    """What the clip shows.

    Args:
        taught: Shapes and colours beyond the language that may be there: 'star', 'turquoise'.

    Raises:
        ValueError: one of them cannot be recognised.
    """
    colors, shapes = _taught(taught)
    frames = frames.float()
    background = _border(frames).median(dim=0).values
    background_name = _nearest(background, BACKGROUNDS)
    distance = (frames - background).norm(dim=-1)
    foreground = distance > FOREGROUND
    areas = _areas(foreground)
    if bool((areas < MIN_AREA).any() or (areas > MAX_AREA).any()):
        return Sighting(
            color=None, shape=None, motion=None, background=background_name, background_rgb=_rgb(background),
            is_empty=bool((_areas(_smoothed(frames - background).norm(dim=-1) > TRACE) < MIN_AREA).all()),
        )  # fmt: skip
    color = _inner_color(frames, distance, foreground)
    along = color - background
    coverage = ((frames - background) @ along / along.square().sum()).clamp(0, 1)
    path = _centres(coverage)
    extent = float(_areas(coverage > 0.5).median().sqrt())
    return Sighting(
        color=_nearest(color, {**COLORS, **colors}),
        shape=_shape(coverage, path, shapes),
        motion=_motion(path),
        background=background_name,
        path=tuple((float(x), float(y)) for x, y in path),
        extent=extent,
        color_rgb=_rgb(color),
        background_rgb=_rgb(background),
        stray_area=float(_areas(foreground & (_distances(path, frames.shape[1:3]) > REACH * extent)).max()),
    )


def _taught(names: tuple[str, ...]) -> tuple[dict[str, tuple[int, int, int]], tuple[str, ...]]:
    """Colours and shapes among `names`."""
    for name in names:
        if name not in TAUGHT_COLORS and name not in TAUGHT_SHAPES:
            known = ", ".join((*TAUGHT_SHAPES, *TAUGHT_COLORS))
            raise ValueError(f"taught names '{name}', which cannot be recognised; use {known}")
    colors = {name: TAUGHT_COLORS[name] for name in names if name in TAUGHT_COLORS}
    return colors, tuple(name for name in names if name in TAUGHT_SHAPES)


def _areas(mask: Tensor) -> Tensor:
    """(F,) of (F, H, W), in square sides."""
    return mask.float().sum(dim=(1, 2)) / min(mask.shape[1:]) ** 2


def _rgb(color: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in color.tolist())


def _smoothed(frames: Tensor) -> Tensor:
    """Means of 3x3 pixels: noise is no trace of a shape."""
    return F.avg_pool2d(frames.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)


def _distances(path: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, H, W) from each frame's centre, in sides."""
    rows, columns = ((torch.arange(length) + 0.5) / min(size) for length in size)
    x, y = columns[None, None, :] - path[:, 0, None, None], rows[None, :, None] - path[:, 1, None, None]
    return (x * x + y * y).sqrt()


def _border(frames: Tensor) -> Tensor:
    """(N, 3): the outermost pixels of every frame."""
    edges = (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1])
    return torch.cat([edge.reshape(-1, 3) for edge in edges])


def _nearest(color: Tensor, named: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float((color - torch.tensor(rgb) / 255).norm()) for name, rgb in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


def _inner_color(frames: Tensor, distance: Tensor, foreground: Tensor) -> Tensor:
    """Median colour of the half of the foreground that differs most: its edge is a mixture."""
    limit = distance[foreground].median()
    return frames[foreground & (distance >= limit)].median(dim=0).values


def _centres(coverage: Tensor) -> Tensor:
    """(F, 2) centre of mass (x, y) in sides."""
    weights = torch.where(coverage > 0.25, coverage, torch.zeros(()))
    height, width = coverage.shape[1:]
    total = weights.sum(dim=(1, 2)).clamp_min(1e-6)
    x = (weights.sum(dim=1) * (torch.arange(width) + 0.5)).sum(dim=1) / total
    y = (weights.sum(dim=2) * (torch.arange(height) + 0.5)).sum(dim=1) / total
    return torch.stack([x, y], dim=1) / min(height, width)


def _motion(path: Tensor) -> str | None:
    if len(path) == 1:
        return "still"
    third = max(1, len(path) // 4)
    way = path[-third:].mean(dim=0) - path[:third].mean(dim=0)
    # Means over the first and last quarter see 3/4 of a steady way.
    way = way / (1 - third / len(path))
    x, y = float(way[0]), float(way[1])
    if max(abs(x), abs(y)) <= STILL:
        return "still"
    long, short = max(abs(x), abs(y)), min(abs(x), abs(y))
    if long < MOVED or long < STRAIGHT * short:
        return None
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _shape(coverage: Tensor, path: Tensor, taught: tuple[str, ...]) -> str | None:
    """The likely shape, unless the outline says clearly otherwise; None where what is there has the outline of none."""
    likely = _likely_shape(coverage)
    if likely is None:
        return None
    frames = list(zip(coverage > 0.5, path, strict=True))
    overlaps = {
        name: float(torch.tensor([_overlap(name, mask, centre) for mask, centre in frames]).median())
        for name in (*AREAS, *taught)
    }
    best = max(overlaps, key=overlaps.__getitem__)
    name = best if best in taught or overlaps[best] > overlaps[likely] + CLEARLY else likely
    return name if overlaps[name] >= MATCH else None


def area_of(shape: str) -> float:
    """In square radii."""
    star = 5 * STAR_RADIUS**2 * STAR_DEPTH * math.sin(math.pi / 5)
    return star if shape == "star" else AREAS[shape]


def _overlap(shape: str, mask: Tensor, centre: Tensor) -> float:
    """Intersection over union of (H, W) with an ideal shape of the same area at `centre` (sides)."""
    size = (mask.shape[0], mask.shape[1])
    x, y = (centre * min(size)).tolist()
    trajectory = Trajectory(start=(x, y), end=(x, y), radius=(float(mask.sum()) / area_of(shape)) ** 0.5)
    ideal = draw(Scene(color="white", shape=shape, background="black"), trajectory, 1, size)[0, ..., 0] > 0.5
    return float((mask & ideal).sum() / (mask | ideal).sum())


def _likely_shape(coverage: Tensor) -> str | None:
    """From the vertical skewness of the mass and how much of its bounding box it fills, medians over frames."""
    fills, skews = [], []
    for frame in coverage:
        mask = frame > 0.5
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows) == 0:
            return None
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        fills.append(mask.sum() / ((bottom - top) * (right - left)))
        # Noise far from the shape would rule a third moment: look one pixel around it only.
        skews.append(_vertical_skewness(frame[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]))
    if float(torch.stack(skews).median()) < TRIANGLE_SKEW:
        return "triangle"
    return "square" if float(torch.stack(fills).median()) > SQUARE_FILL else "circle"


def _vertical_skewness(frame: Tensor) -> Tensor:
    mass = torch.where(frame > 0.15, frame, torch.zeros(())).sum(dim=1)
    mass = mass / mass.sum()
    rows = torch.arange(len(mass), dtype=frame.dtype)
    offsets = rows - (mass * rows).sum()
    return (mass * offsets**3).sum() / (mass * offsets**2).sum() ** 1.5
