"""Which token blocks attend to which: the rule of NABLA (report section 5.4) as pure functions.

Shape legend: B batch, S = 64*n tokens in block order, n token blocks, d head_dim. Masks: (.., query block, key block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import BLOCK_TOKENS

MAX_SCORES = 2**24
"""Entries of the pooled map sorted at a time: the peak above the result stays near 400 MB, or one head's n*n
where that is more."""


def window_mask(
    blocks: tuple[int, int, int], window: tuple[int, int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """(n, n) bool: blocks at most window//2 apart along each of (t, h, w); plain, centred, not shifted at borders.

    Args:
        blocks: Token blocks along (T, hb, wb).
        window: Odd sizes of the neighbourhood, in token blocks.
    """
    allowed = torch.ones((1, 1), dtype=torch.bool, device=device)
    for count, size in zip(blocks, window, strict=True):
        position = torch.arange(count, device=device)
        near = (position[:, None] - position[None]).abs() <= size // 2
        # The n*n mask is the Kronecker product of the three axes, the last axis running fastest.
        allowed = (allowed[:, None, :, None] & near[None, :, None]).flatten(2).flatten(0, 1)
    return allowed


def pool_blocks(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over the real tokens of each block, (B, heads, S, d) to (B, heads, n, d) fp32."""
    blocks = x.unflatten(2, (-1, BLOCK_TOKENS))
    if token_mask is None:
        return blocks.mean(dim=3, dtype=torch.float32)
    real = token_mask.view(-1, BLOCK_TOKENS, 1)
    return blocks.masked_fill(~real, 0).sum(dim=3, dtype=torch.float32) / real.sum(dim=1)


def keep_by_mass(probabilities: Tensor, mass: float) -> Tensor:
    """Bool like `probabilities`: per row the entries left when the smallest, together less than 1-mass, are dropped.

    The entry whose running sum reaches 1-mass is kept. Equal entries are dropped in order of their index (stable
    sort), so the result does not depend on the device; upstream leaves ties to an unstable sort.
    """
    ascending, order = probabilities.sort(dim=-1, stable=True)
    kept = ascending.cumsum(dim=-1) >= 1.0 - mass
    kept[..., -1] = True  # The rule always keeps the largest; a rounded sum just below 1 must not lose it.
    return torch.empty_like(kept).scatter_(-1, order, kept)


@torch.no_grad()
def mass_mask(q: Tensor, k: Tensor, mass: float, token_mask: Tensor | None = None) -> Tensor:
    """(B, heads, n, n) bool: the key blocks that hold `mass` of each row of the pooled attention map.

    Args:
        q, k: (B, heads, S, d) as attention sees them, normalised and rotated, in block order.
        mass: Kept probability in (0, 1]; 1 keeps everything.
        token_mask: (S,) bool, True for real tokens, which alone are pooled. None where nothing is padded.
    """
    return pooled_mass_mask(pool_blocks(q, token_mask) * q.shape[-1] ** -0.5, pool_blocks(k, token_mask), mass)


@torch.no_grad()
def pooled_mass_mask(pooled_q: Tensor, pooled_k: Tensor, mass: float) -> Tensor:
    """`mass_mask` of block means (B, heads, n, d), those of queries divided by sqrt(d)."""
    queries, keys = pooled_q.flatten(0, 1), pooled_k.flatten(0, 1)
    blocks = queries.shape[1]
    kept = torch.empty(len(queries), blocks, blocks, dtype=torch.bool, device=queries.device)
    group = max(1, MAX_SCORES // blocks**2)
    for start in range(0, len(kept), group):
        some = slice(start, start + group)
        kept[some] = keep_by_mass(torch.softmax(queries[some] @ keys[some].mT, dim=-1), mass)
    return kept.unflatten(0, pooled_q.shape[:2])


@torch.no_grad()
def kept_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A block mask (B, heads, n, n) as lists: counts (B, heads, n) and indices (B, heads, n, n), both int32.

    The first `counts` indices of a row are its kept key blocks, ascending; the rest are the others, ascending too.
    """
    indices = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    group = max(1, MAX_SCORES // mask.shape[-1] ** 2)
    # Both give the same. Sorting bytes is quick on a CPU; elsewhere it takes many passes over memory, ranks take few.
    listed = listed_by_sorting if mask.device.type == "cpu" else listed_by_rank
    for rows, chosen in zip(mask.flatten(0, 1).split(group), indices.flatten(0, 1).split(group), strict=True):
        chosen.copy_(listed(rows))
    return mask.sum(dim=-1, dtype=torch.int32), indices


def listed_by_sorting(mask: Tensor) -> Tensor:
    """Indices along the last dimension of a bool mask, int32: the true ones first."""
    # As bytes: sorting is not defined for bool on every device.
    return mask.view(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def listed_by_rank(mask: Tensor) -> Tensor:
    """`listed_by_sorting` without a sort: each index is written to the place that counting gives it."""
    rank = mask.cumsum(dim=-1, dtype=torch.int32)
    position = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    # Behind all the true ones, a false one has as many before it as lie left of it and are false.
    place = torch.where(mask, rank - 1, rank[..., -1:] + position - rank)
    return torch.empty_like(rank).scatter_(-1, place.long(), position.expand_as(rank))
