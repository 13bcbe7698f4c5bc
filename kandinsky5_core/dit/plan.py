"""What the visual blocks need that depends only on the size of a clip: made once a run, used every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..attention.dense import AttentionFn, dense_attention
from ..attention.nabla import NablaAttention
from ..config import DiTConfig, NablaConfig
from .rope import Rope, rope_table, text_angles, visual_angles


@dataclass(frozen=True, kw_only=True)
class VisualPlan:
    """Rotary table and attention for one token grid; the table is in the order of the tokens inside the blocks."""

    grid: tuple[int, int, int]
    """Tokens along (t, h, w)."""
    rope: Rope
    nabla: NablaAttention | None
    """Sparse attention, with tokens in block order; None for dense attention in row-major order."""
    dense: AttentionFn = dense_attention
    """The engine for dense attention among visual tokens; that to the text is short and may be masked: PyTorch's."""
    text_ropes: dict[tuple[int, torch.device], Rope] = field(default_factory=dict, repr=False)
    """Rotary tables of texts by length, as far as this run has needed them."""

    @property
    def attention(self) -> AttentionFn:
        """What the visual tokens use among themselves."""
        return self.dense if self.nabla is None else self.nabla

    def text_rope(self, length: int, head_dim: int, device: torch.device) -> Rope:
        """The table of text positions 0..length-1; made at the first call."""
        key = (length, device)
        if key not in self.text_ropes:
            self.text_ropes[key] = rope_table(text_angles(length, head_dim, device))
        return self.text_ropes[key]


def plan_visual(
    config: DiTConfig, grid: tuple[int, int, int], rope_scale: tuple[float, float, float],
    nabla: NablaConfig | None = None, device: torch.device | str = "cpu", dense: AttentionFn = dense_attention,
) -> VisualPlan:  # fmt: skip
    """The plan for clips of `grid` tokens; `dense` is an engine of `attention.engines`."""
    angles = visual_angles(grid, config.axes_dims, rope_scale, device)
    if nabla is None:
        return VisualPlan(grid=grid, rope=rope_table(angles), nabla=None, dense=dense)
    sparse = NablaAttention(nabla, grid, device=device)
    rope = rope_table(sparse.reorder(angles[None])[0])
    return VisualPlan(grid=grid, rope=rope, nabla=sparse, dense=dense)
