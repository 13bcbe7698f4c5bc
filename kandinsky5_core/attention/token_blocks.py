"""The order of tokens under NABLA: 64 tokens of one 1x8x8 token block lie together (report section 5.4).

Shape legend: T, h, w token grid; hb, wb token blocks along h and w (rounded up); n = T*hb*wb; S = 64*n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import BLOCK_SIDE


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlocks:
    """Where each token of a (T, h, w) grid goes; grids that are not whole blocks are padded and cropped."""

    grid: tuple[int, int, int]
    """Tokens along (T, h, w)."""
    blocks: tuple[int, int, int]
    """Token blocks along (T, hb, wb)."""
    order: Tensor
    """(S,) row-major id of the token at each place; padding repeats the nearest token of the same block."""
    inverse: Tensor
    """(T*h*w,) place of each token."""
    token_mask: Tensor | None
    """(S,) bool, True for real tokens; None where nothing is padded."""

    def reorder(self, x: Tensor, dim: int = 1) -> Tensor:
        """Row-major to block order along `dim`: (.., T*h*w, ..) to (.., S, ..)."""
        return x.index_select(dim, self.order)

    def restore(self, x: Tensor, dim: int = 1) -> Tensor:
        """Block order to row-major along `dim`, without the padding: (.., S, ..) to (.., T*h*w, ..)."""
        return x.index_select(dim, self.inverse)


def token_blocks(grid: tuple[int, int, int], device: torch.device | str = "cpu") -> TokenBlocks:
    """Block order (t, h//8, w//8, h%8, w%8) of a grid of T, h, w tokens.

    Raises:
        ValueError: a side of the grid is not positive.
    """
    if min(grid) < 1:
        raise ValueError(f"token grid {grid} is empty; every side must be at least 1")
    frames, height, width = grid
    blocks = (frames, -(-height // BLOCK_SIDE), -(-width // BLOCK_SIDE))
    t, row, column = _block_order_positions(blocks, device)
    real = (row < height) & (column < width)
    order = (t * height + row.clamp(max=height - 1)) * width + column.clamp(max=width - 1)
    inverse = torch.empty(frames * height * width, dtype=torch.long, device=device)
    inverse[order[real]] = real.nonzero().squeeze(1)
    padded = len(order) > len(inverse)
    return TokenBlocks(
        grid=grid, blocks=blocks, order=order, inverse=inverse, token_mask=real if padded else None
    )  # fmt: skip


def _block_order_positions(blocks: tuple[int, int, int], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """(t, row, column) of every place, each (S,), rows and columns running on into the padding."""
    shape = (*blocks, BLOCK_SIDE, BLOCK_SIDE)
    t, hb, wb, hs, ws = (
        torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(5)])
        for axis, size in enumerate(shape)
    )
    positions = (t, hb * BLOCK_SIDE + hs, wb * BLOCK_SIDE + ws)
    return tuple(position.expand(shape).flatten() for position in positions)  # type: ignore[return-value]
