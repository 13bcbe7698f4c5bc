"""A few samples of one size, held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kandinsky5_core.conditioning import TextConditioning

from ..objectives.flow_matching import Batch


@dataclass
class RowBatches:
    """Random rows, some without their caption: batches for an objective."""

    latents: Tensor
    """(N, C, T, H, W)."""
    text: TextConditioning
    """Of every row, and a last one, the empty prompt."""
    batch_size: int = 8
    caption_dropout: float = 0.1

    def __call__(self, index: int, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """The batch of one step."""
        empty = len(self.latents)
        rows = torch.randint(empty, (self.batch_size,), generator=generator)
        dropped = torch.rand(self.batch_size, generator=generator) < self.caption_dropout
        return Batch(latents=self.latents[rows], text=self.text.rows(torch.where(dropped, empty, rows)))
