"""The sigma schedule of flow matching."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_schedule(num_steps: int, shift: float) -> Tensor:
    """Sigmas (num_steps+1,) fp32 from 1 (noise) to 0, warped by `shift`: s -> shift*s / (1 + (shift-1)*s).

    Raises:
        ValueError: num_steps below 1 or shift not positive.
    """
    if num_steps < 1:
        raise ValueError(f"steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; the released models use 3 to 10")
    uniform = torch.linspace(1, 0, num_steps + 1)
    return shift * uniform / (1 + (shift - 1) * uniform)
