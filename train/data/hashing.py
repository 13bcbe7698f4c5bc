"""Perceptual hashes: material that looks the same, whatever its file, size or compression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

GRID = 8
MAX_DISTANCE = 3
"""Bits that may differ between duplicates, of 192 a frame."""
MAX_COLOUR = 0.02
"""Mean difference of 8x8 thumbnails, on a scale of 1, that duplicates may have: gradients know no flat colour."""
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
    small = F.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).float(), (GRID, GRID + 1))
    # Flat areas give a clean zero instead of the sign of compression noise.
    signs = (small[..., 1:] - small[..., :-1] > 1 / 255).flatten(1)
    bits = tuple(int("".join("1" if bit else "0" for bit in row.tolist()), 2) for row in signs)
    return Fingerprint(bits=bits, thumbnail=F.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).float(), (GRID, GRID)))


def near_duplicates(looks: Sequence[tuple[Path, Fingerprint]]) -> list[tuple[Path, Path]]:
    """(later, earlier) for each that looks like one before it; in near-linear time.

    Hashes within `MAX_DISTANCE` agree in at least one of `BANDS` equal parts, so only those are compared.
    """
    kept: list[tuple[Path, Fingerprint]] = []
    by_band: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    found = []
    for path, look in looks:
        keys = _bands(look)
        candidates = sorted({index for key in keys for index in by_band[key]})
        same = next((index for index in candidates if alike(look, kept[index][1])), None)
        if same is not None:
            found.append((path, kept[same][0]))
            continue
        for key in keys:
            by_band[key].append(len(kept))
        kept.append((path, look))
    return found


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Close in shape and in colour."""
    if len(one.bits) != len(other.bits):
        return False
    distance = sum((a ^ b).bit_count() for a, b in zip(one.bits, other.bits, strict=True))
    if distance > MAX_DISTANCE:
        return False
    return float((one.thumbnail - other.thumbnail).abs().mean(dim=(1, 2, 3)).max()) <= MAX_COLOUR


def _bands(look: Fingerprint) -> list[tuple[int, int, int]]:
    """The hash in parts: (frames, number, value)."""
    length = GRID * GRID * 3
    whole = 0
    for bits in look.bits:
        whole = whole << length | bits
    width = -(-length * len(look.bits) // BANDS)
    return [(len(look.bits), band, whole >> (band * width) & ((1 << width) - 1)) for band in range(BANDS)]
