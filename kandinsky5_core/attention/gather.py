"""Block-sparse attention with nothing but PyTorch's dense attention: exact, differentiable, on every device.

Shape legend: B batch, S = 64*n tokens in block order, n token blocks, d head_dim; a row is one query block of
one head of one clip, R = B*heads*n rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import BLOCK_TOKENS
from .block_mask import kept_blocks

GATHERED_NUMBERS_CPU = 2**20
"""Numbers of gathered keys (and as many of values) at a time on CPU, where small pieces stay in the cache."""
GATHERED_NUMBERS = 2**26
"""The same on other devices, where fewer, larger calls are quicker."""


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Attention of each query block to its kept key blocks, copied together a group of rows at a time.

    Beyond the inputs and the output, memory is bounded by 2 * max(GATHERED_NUMBERS, S*d) numbers and the block
    lists (5 bytes a mask entry); with gradients each group is computed again in the backward pass, so the bound
    holds there too.

    Args:
        q, k, v: (B, heads, S, d) in block order.
        mask: (B, heads, n, n) bool; every row keeps at least one block.
        token_mask: (S,) bool, True for real tokens; padded keys are ignored. None where nothing is padded.

    Returns:
        (B, heads, S, d).
    """
    # (B, heads, n, 64, d) without a copy, whatever the order in memory.
    q_blocks, k_blocks, v_blocks = (x.unflatten(2, (-1, BLOCK_TOKENS)) for x in (q, k, v))
    counts, indices = (part.flatten(0, 2) for part in kept_blocks(mask))
    # Rows of like length go together, so that little is padded within a group.
    order = counts.argsort(descending=True)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    attend = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False) if wants_grad else _attend
    budget = (GATHERED_NUMBERS_CPU if q.device.type == "cpu" else GATHERED_NUMBERS) // (BLOCK_TOKENS * q.shape[-1])
    attended, parts = torch.empty_like(q_blocks), []
    for rows, width in _row_groups(order, counts[order].tolist(), budget):
        clips, heads, places = torch.unravel_index(rows, mask.shape[:-1])
        chosen = indices[rows, :width].long()
        keep = _key_mask(chosen, counts[rows], token_mask)
        keys = (clips[:, None], heads[:, None], chosen)
        part = attend(q_blocks[clips, heads, places], k_blocks, v_blocks, keys, keep)
        if wants_grad:
            parts.append(part)
        else:
            attended[clips, heads, places] = part
    if wants_grad:
        attended = torch.cat(parts)[order.argsort()].view_as(attended)
    return attended.flatten(2, 3)


def _row_groups(order: Tensor, counts: Sequence[int], budget: int) -> Iterator[tuple[Tensor, int]]:
    """Cut rows, sorted by falling count, into groups of at most `budget` key blocks (but at least one row)."""
    start = 0
    while start < len(counts):
        width = counts[start]
        stop = start + max(1, budget // width)
        yield order[start:stop], width
        start = stop


def _key_mask(chosen: Tensor, counts: Tensor, token_mask: Tensor | None) -> Tensor | None:
    """(rows, 1, 1, width*64) bool of the gathered keys to look at; None where that is all of them."""
    width = chosen.shape[1]
    kept = torch.arange(width, device=chosen.device) < counts[:, None]
    if token_mask is not None:
        real = token_mask.view(-1, BLOCK_TOKENS)[chosen]
        return (real & kept[..., None]).flatten(1)[:, None, None]
    if bool(kept.all()):
        return None
    return kept.repeat_interleave(BLOCK_TOKENS, dim=1)[:, None, None]


def _attend(
    q_rows: Tensor, k_blocks: Tensor, v_blocks: Tensor, keys: tuple[Tensor, ...], keep: Tensor | None
) -> Tensor:
    """q_rows (rows, 64, d) to the blocks `keys` (rows, width) of (B, heads, n, 64, d); (rows, 64, d)."""
    gathered_k, gathered_v = (x[keys].flatten(1, 2)[:, None] for x in (k_blocks, v_blocks))
    return F.scaled_dot_product_attention(q_rows[:, None], gathered_k, gathered_v, attn_mask=keep)[:, 0]
