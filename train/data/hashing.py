"""Perceptual hashes: material that looks the same, whatever its file, size or compression."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

GRID = 8
FLAT = 1 / 255
"""A smaller step is none: flat areas give a clean zero instead of the sign of compression noise."""
MAX_DISTANCE = 8
"""Bits, of a frame's 192, that may differ between duplicates; recompressed at another size, photographs differ by as
many, and two of them by 67 or more."""
MAX_COLOUR, MAX_CELL = 0.01, 0.03
"""Mean difference of 8x8 thumbnails, and that of one cell, on a scale of 1, that duplicates may have: signs know no
flat colour, and a mean no small thing."""
BANDS = MAX_DISTANCE + 1


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a picture, or three frames of a clip, look like."""

    bits: tuple[int, ...]
    """For each frame the signs of its horizontal differences, 64 for each colour (difference hash)."""
    thumbnail: Tensor
    """(F, 3, 8, 8) in [0, 1]."""


def fingerprint(frames: Tensor) -> Fingerprint:
    """Of frames (F, H, W, 3) in [0, 1]."""
    pixels = frames.permute(0, 3, 1, 2).float()
    small = _shrunk(pixels, (GRID, GRID + 1))
    signs = (small[..., 1:] - small[..., :-1] > FLAT).flatten(1)
    bits = tuple(int("".join("1" if bit else "0" for bit in row.tolist()), 2) for row in signs)
    return Fingerprint(bits=bits, thumbnail=_shrunk(pixels, (GRID, GRID)))


def _shrunk(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    # Means over whole cells would differ between sizes that are no multiples of the grid.
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def near_duplicates(looks: Sequence[Fingerprint]) -> dict[int, int]:
    """Index of the earlier one for each that looks like one before it; in near-linear time.

    Hashes within `MAX_DISTANCE` agree in at least one of `BANDS` equal parts, so only those are compared.
    """
    by_band: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found = {}
    for number, look in enumerate(looks):
        level = _level(look)
        near = (by_band.get((*band, level + step), ()) for band in _bands(look) for step in (-1, 0, 1))
        candidates = sorted({index for indices in near for index in indices})
        same = next((index for index in candidates if alike(look, looks[index])), None)
        if same is not None:
            found[number] = same
            continue
        for band in _bands(look):
            by_band[(*band, level)].append(number)
    return found


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Close in shape and in colour, in every frame."""
    if len(one.bits) != len(other.bits):
        return False
    if any((a ^ b).bit_count() > MAX_DISTANCE for a, b in zip(one.bits, other.bits, strict=True)):
        return False
    difference = (one.thumbnail - other.thumbnail).abs()
    return float(difference.mean(dim=(1, 2, 3)).max()) <= MAX_COLOUR and float(difference.max()) <= MAX_CELL


def _level(look: Fingerprint) -> int:
    """Brightness of the middle frame in steps of `MAX_COLOUR`: at most one apart between duplicates."""
    return math.floor(float(look.thumbnail[len(look.bits) // 2].mean()) / MAX_COLOUR)


def _bands(look: Fingerprint) -> Iterator[tuple[int, int, int]]:
    """The middle frame's hash in parts: (frames, number, value)."""
    bits = look.bits[len(look.bits) // 2]
    width = math.ceil(3 * GRID * GRID / BANDS)
    for band in range(BANDS):
        yield len(look.bits), band, bits >> (band * width) & ((1 << width) - 1)
