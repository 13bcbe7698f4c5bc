"""Floating-point operations of the DiT in closed form: two for each multiplication in a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..config import DiTConfig


def dit_flops(config: DiTConfig, grid: Sequence[int], text_tokens: int, *, batch: int = 1, kept: float = 1.0) -> int:
    """Of one evaluation.

    Args:
        grid: Visual tokens along (t, h, w).
        kept: Share of the visual attention that is computed; below 1 with NABLA.
    """
    tokens, dim, hidden = prod(grid), config.model_dim, config.ff_dim
    text_block = text_tokens * (4 * dim**2 + 2 * dim * hidden) + 2 * text_tokens**2 * dim
    visual_block = (
        tokens * (6 * dim**2 + 2 * dim * hidden)
        + 2 * text_tokens * dim**2
        + 2 * tokens * dim * (kept * tokens + text_tokens)
    )
    per_row = config.time_dim * dim * (6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2)
    patch = prod(config.patch_size)
    ends = (
        tokens * patch * dim * (config.input_channels + config.out_visual_dim)
        + text_tokens * config.in_text_dim * dim
        + config.in_text_dim2 * config.time_dim
        + (dim + config.time_dim) * config.time_dim
    )
    blocks = config.num_text_blocks * text_block + config.num_visual_blocks * visual_block
    return int(2 * batch * (blocks + per_row + ends))


def attention_flops(tokens: int, heads: int, head_dim: int) -> int:
    """Of dense self-attention."""
    return 4 * tokens**2 * heads * head_dim
