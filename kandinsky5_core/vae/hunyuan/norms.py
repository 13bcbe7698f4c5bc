"""Group norm in two steps: its statistics over a clip that lies in pieces, and its use on one piece.

A group norm of the HunyuanVideo VAE sees the whole clip, so a piece of it cannot be normalised before the statistics
of all are known. Pieces are (1, C, T, H, W), of one clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Moments(NamedTuple):
    """Mean and variance of each channel's group, (C,) fp32."""

    mean: Tensor
    var: Tensor


Known = dict[nn.Module, Moments]
"""Statistics by norm: made for one clip, and dropped with it."""


def moments_over(norm: nn.GroupNorm, pieces: Iterable[Tensor]) -> Moments:
    """Statistics of `norm` over all pieces together, as over the clip they make."""
    count, total, squares = 0, 0.0, 0.0
    for x in pieces:
        count += x[0, 0].numel()
        # Reduced in fp32 without an fp32 copy of the piece, put together in fp64.
        total = total + x.sum(dim=(0, 2, 3, 4), dtype=torch.float32).double()
        squares = squares + torch.linalg.vector_norm(x, dim=(0, 2, 3, 4), dtype=torch.float32).double().square()
    per_group = norm.num_channels // norm.num_groups
    mean = (total / count).view(norm.num_groups, per_group).mean(1)
    var = (squares / count).view(norm.num_groups, per_group).mean(1) - mean.square()
    return Moments(*(value.clamp(min=floor).repeat_interleave(per_group).float() for value, floor in
                     ((mean, -torch.inf), (var, 0.0))))  # fmt: skip


def normed(norm: nn.GroupNorm, moments: Moments, x: Tensor) -> Tensor:
    """`norm` of a piece with the statistics of its clip, dtype of `x`; computed in fp32."""
    weight, bias = (parameter.to(x.device, torch.float32) for parameter in (norm.weight, norm.bias))
    # A batch norm with given statistics is this very formula, in one pass and with one result.
    return F.batch_norm(x, moments.mean, moments.var, weight, bias, False, 0.0, norm.eps)


def normed_silu(norm: nn.GroupNorm, moments: Moments, x: Tensor) -> Tensor:
    """SiLU of `normed`."""
    return F.silu(normed(norm, moments, x), inplace=True)
