"""What the visual blocks need that depends only on the size of a clip: made once a run, used every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention.dense import AttentionFn, dense_attention
from ..attention.nabla import NablaAttention
from ..config import DiTConfig, NablaConfig
from .rope import Rope, rope_table, visual_angles


@dataclass(frozen=True, kw_only=True)
class VisualPlan:
    """Rotary table and attention for one token grid; the table is in the order of the tokens inside the blocks."""

    grid: tuple[int, int, int]
    """Tokens along (t, h, w)."""
    rope: Rope
    nabla: NablaAttention | None
    """Sparse attention, with tokens in block order; None for dense attention in row-major order."""

    @property
    def attention(self) -> AttentionFn:
        return dense_attention if self.nabla is None else self.nabla


def plan_visual(
    config: DiTConfig, grid: tuple[int, int, int], rope_scale: tuple[float, float, float],
    nabla: NablaConfig | None = None, device: torch.device | str = "cpu",
) -> VisualPlan:  # fmt: skip
    """The plan for clips of `grid` tokens."""
    angles = visual_angles(grid, config.axes_dims, rope_scale, device)
    if nabla is None:
        return VisualPlan(grid=grid, rope=rope_table(angles), nabla=None)
    sparse = NablaAttention(nabla, grid, device=device)
    return VisualPlan(grid=grid, rope=rope_table(sparse.reorder(angles[None])[0]), nabla=sparse)
