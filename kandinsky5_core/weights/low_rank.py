"""Pairs of low rank: what they add to a weight, and the nearest pair of a smaller rank.

A pair is `down` (rank, in), `up` (out, rank) and a scale; it adds scale * up @ down, (out, in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lora import Lora

_NEGLIGIBLE = 1e-7
"""Singular values this small beside the largest are rounding."""


class Truncated(NamedTuple):
    """The nearest pair of a rank, at scale 1."""

    down: Tensor
    up: Tensor
    kept: float
    """Energy (squared Frobenius norm) of the pair."""
    whole: float
    """Energy of what it stands for."""


def lora_deltas(lora: Lora) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Down, up and scale (alpha / rank) by module.

    Raises:
        ValueError: half of a pair is missing.
    """
    found = {}
    for name, down in lora.tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        if f"{module}.lora_B.weight" not in lora.tensors:
            raise ValueError(f"the LoRA has no up matrix (lora_B) for {module}; the file is damaged")
        alpha = float(lora.tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))))
        found[module] = (down, lora.tensors[f"{module}.lora_B.weight"], alpha / len(down))
    return found


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(out, in) fp32, what a LoRA adds to a weight at strength 1."""
    return scale * (up.float() @ down.float())


def truncated(change: Tensor, rank: int) -> Truncated:
    """The pair (fp32) whose product is nearest to `change` (out, in), by Eckart and Young.

    From the eigenvectors of the smaller Gram matrix in fp64: many times as fast as an SVD of a wide layer, and as exact
    for all singular values above 1e-7 of the largest.
    """
    rank = min(rank, *change.shape)
    change = change.double()
    if change.shape[0] < change.shape[1]:
        turned = truncated(change.T, rank)
        return turned._replace(down=turned.up.T.contiguous(), up=turned.down.T.contiguous())
    squares, right = torch.linalg.eigh(change.T @ change)
    squares, right = squares.flip(0)[:rank].clamp(min=0), right.flip(1)[:, :rank]
    values = squares.sqrt()
    down = values.sqrt()[:, None] * right.T
    # A column of noise over almost nothing would be noise; there is nothing to keep.
    up = torch.where(values > _NEGLIGIBLE * values.max(), change @ right / values.sqrt(), 0.0)
    return Truncated(
        down.float().contiguous(), up.float().contiguous(), float(squares.sum()), float(change.square().sum())
    )


def truncated_product(down: Tensor, up: Tensor, rank: int) -> Truncated:
    """The same for `up @ down` (out, in), without making it: QR of both, then an SVD as large as their rank."""
    if down.shape[0] >= min(down.shape[1], up.shape[0]):
        return truncated(up.double() @ down.double(), rank)
    left, left_small = torch.linalg.qr(up.double())
    right, right_small = torch.linalg.qr(down.double().T)
    small = truncated(left_small @ right_small.T, rank)
    return small._replace(
        down=(small.down.double() @ right.T).float().contiguous(), up=(left @ small.up.double()).float().contiguous()
    )
