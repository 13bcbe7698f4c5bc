"""Rotary position embeddings (facts: interleaved pairs, base 10000, angles divided by a scale per axis).

Shape legend: B batch, S tokens, N heads, d head_dim; tables are (S, d/2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10000.0
COMPLEX_DEVICES = ("cpu", "cuda", "meta")
"""Where a product of complex numbers is one fast pass over memory; on meta, where sizes are counted, as there."""


class Rope(NamedTuple):
    """Cosines and sines, each (S, d/2) fp32."""

    cos: Tensor
    sin: Tensor


def frequencies(dim: int, device: torch.device | str | None = None) -> Tensor:
    """(dim/2,) fp32: 10000^(-i/(dim/2))."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / half
    return torch.exp(-math.log(BASE) * exponents)


def text_angles(length: int, head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """(length, d/2) angles of text positions 0..length-1."""
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies(head_dim, device))


def visual_angles(
    grid: tuple[int, int, int], axes_dims: tuple[int, int, int], scale: tuple[float, float, float],
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """(t*h*w, d/2) angles in row-major token order; axis a contributes axes_dims[a]/2 of them."""
    t, h, w = grid
    per_axis = [
        torch.outer(torch.arange(size, dtype=torch.float32, device=device) / factor, frequencies(dim, device))
        for size, dim, factor in zip(grid, axes_dims, scale, strict=True)
    ]
    angles = [
        per_axis[0].view(t, 1, 1, -1).expand(t, h, w, -1),
        per_axis[1].view(1, h, 1, -1).expand(t, h, w, -1),
        per_axis[2].view(1, 1, w, -1).expand(t, h, w, -1),
    ]
    return torch.cat(angles, dim=-1).flatten(0, 2)


def rope_table(angles: Tensor) -> Rope:
    """Cosines and sines of angles (S, d/2)."""
    return Rope(angles.cos(), angles.sin())


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (B, S, N, d) by a table (S, d/2), in fp32.

    The result is rounded to bfloat16 whatever the model's dtype: the released weights were trained with that
    rounding, and without it the first block's output moves by about 2.5e-4 (relative).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    if x.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:  # The same, written out: compilers fuse it, and know no complex numbers.
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
    return rotated.flatten(-2).to(torch.bfloat16).to(x.dtype)
