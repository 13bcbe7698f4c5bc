"""Nearest-neighbour upsampling and the convolution after it as one: the upsampled clip is never made.

Where a kernel lies on copies of one position, its taps there are added first. By two on an axis, each output sees two
positions instead of three: 8 of 27 products are left where time is doubled too, 12 where only space is, of an eighth or
a quarter of the positions. Phase (t, i, j) is the outputs at t, i, j of every 2x2x2. Exact up to rounding.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .layers import Upsample

Kernels = dict[tuple[int, int, int], Tensor]
ROWS = 64
"""Output channels whose taps are added at once: the sums are in fp32, and all together would be a copy of the layer."""


def fold_kernels(layer: Upsample, like: Tensor) -> Kernels:
    """The kernel (C_out, C_in, kt, 2, 2) of each phase, dtype and device of `like`; added in fp32."""
    weight, doubles = layer.conv.conv.weight, layer.factor[0] == 2
    sizes = (*weight.shape[:2], 2 if doubles else 3, 2, 2)
    phases = itertools.product((0, 1) if doubles else (0,), (0, 1), (0, 1))
    kernels = {phase: like.new_empty(sizes) for phase in phases}
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS].to(like.device, torch.float32)
        for (t, i, j), kernel in kernels.items():
            # Causal: the second frame of a pair lies with the frame before it, in space the first of two columns does.
            late = 2 - t if doubles else 0
            kernel[start : start + ROWS] = _fold(_fold(_fold(rows, 2, late), 3, i + 1), 4, j + 1)
    return kernels


def _fold(weight: Tensor, dim: int, side: int) -> Tensor:
    """Three taps as two: side 1 adds the last two, side 2 the first two; 0 leaves them."""
    if side == 0:
        return weight
    first, middle, last = weight.split(1, dim=dim)
    return torch.cat([first, middle + last] if side == 1 else [first + middle, last], dim=dim)
