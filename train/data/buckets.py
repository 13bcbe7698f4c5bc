"""Buckets: the sizes and lengths that material is cut to, so that batches are of one shape.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kandinsky5_core.canvas import check_side
from kandinsky5_core.config import Variant

from ..config import DataConfig

RATIOS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2.0, 0.5)
"""Width to height, where the area is the user's; else the variant's own resolutions serve."""
SIZE_MULTIPLE, NABLA_MULTIPLE = 16, 128
LENGTHS = (5, 9, 13, 17, 25, 33, 49, 65, 81, 97, 121, 161, 201, 241)
"""Frames of a clip that make a queue of their own: few enough for queues to fill, close enough to lose little."""


class Bucket(NamedTuple):
    """The shape that a sample is cut to."""

    height: int
    width: int
    num_frames: int

    def latent_frames(self, temporal_ratio: int) -> int:
        """Frames of its latents."""
        return (self.num_frames - 1) // temporal_ratio + 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.num_frames}" if self.num_frames > 1 else "")


def bucket_sizes(data: DataConfig, variant: Variant) -> tuple[tuple[int, int], ...]:
    """Sizes to choose among.

    Raises:
        ValueError: `data.area` is too small for one, or beyond the models' positions.
    """
    if not data.area:
        return variant.resolutions
    multiple = NABLA_MULTIPLE if variant.nabla is not None else SIZE_MULTIPLE
    if data.area < multiple * multiple:
        raise ValueError(f"data.area {data.area} is below {multiple}x{multiple} pixels, the least for {variant.name}")
    sizes = []
    for ratio in RATIOS:
        height = max(1, round(math.sqrt(data.area / ratio) / multiple)) * multiple
        width = max(1, round(math.sqrt(data.area * ratio) / multiple)) * multiple
        check_side(height, width)
        sizes.append((height, width))
    return tuple(dict.fromkeys(sizes))


def choose_size(height: int, width: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size whose ratio is nearest, of several the one with the area nearest to the picture's."""
    ratio = math.log(height / width)
    return min(
        sizes,
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 6), abs(size[0] * size[1] - height * width)),
    )


def longest_clip(data: DataConfig, variant: Variant) -> int:
    """Pixel frames."""
    return data.max_frames or variant.num_frames


def choose_length(available: int, longest: int) -> int:
    """The most frames, of `LENGTHS` and `longest`, that `available` ones at the model's rate give; 0 for too few."""
    return max((length for length in (*LENGTHS, longest) if length <= min(available, longest)), default=0)


def batch_size(bucket: Bucket, kind: str, longest: int, data: DataConfig, temporal_ratio: int) -> int:
    """Samples of a bucket in one batch: as many as the frame budget holds.

    Args:
        kind: 'clip', 'image' or 'edit'.
        longest: Latent frames of the longest sample; the budget where the user gives none.
    """
    budget = data.frame_budget or longest
    if kind != "clip" and data.image_batch:
        budget = data.image_batch
    return max(1, budget // bucket.latent_frames(temporal_ratio))
