"""The sigma schedule of flow matching."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_schedule(num_steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Sigmas (num_steps+1,) fp32 from 1 (noise) to 0, warped by `shift`: s -> shift*s / (1 + (shift-1)*s).

    Below 1, `denoise` begins at the warped level of that value, for sampling that starts from given latents.

    Raises:
        ValueError: num_steps below 1, shift not positive, or denoise not above 0 and up to 1.
    """
    if num_steps < 1:
        raise ValueError(f"steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; the released models use 3 to 10")
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}; 0.4 keeps much, 0.8 little")
    # Quotients, not torch.linspace: rounded once, they are the same bits in every table of the same levels.
    return shifted(denoise * (torch.arange(num_steps, -1, -1) / num_steps), shift)


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] warped by `shift`; the ends stay."""
    return shift * uniform / (1 + (shift - 1) * uniform)
