"""Initial noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import LatentShape

MAX_SEED = 2**63 - 1


def initial_noise(shape: LatentShape, seed: int) -> Tensor:
    """Standard normal (B, C, T, H, W) fp32 on the CPU: equal whatever device the model runs on.

    Row i of a batch is the noise of seed+i alone, so a batch holds what single runs with consecutive seeds give.
    """
    rows = [
        torch.randn(shape[1:], generator=torch.Generator("cpu").manual_seed((seed + row) % MAX_SEED))
        for row in range(shape.batch)
    ]
    return torch.stack(rows)
