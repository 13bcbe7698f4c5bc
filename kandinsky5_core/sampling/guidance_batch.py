"""Whether the positive and the negative pass of guidance run as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import DiTConfig
from ..memory.activations import dit_bytes

BATCH_CHOICES = ("auto", "on", "off")
BUSY_TOKENS = 16_384
"""A clip of this many tokens keeps an accelerator busy alone: 'auto' batches only smaller ones."""
SPARE = 1.5
"""Free memory must be this many times the estimate."""


def activation_bytes(config: DiTConfig, num_tokens: int, dtype: torch.dtype, batch: int = 1) -> int:
    """The most that activations of one evaluation take at once, without gradients."""
    return dit_bytes(config, num_tokens, dtype.itemsize, batch=batch)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator, what PyTorch holds in reserve included; None where it does not tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def batches_guidance(
    choice: str, config: DiTConfig, grid: Sequence[int], *, batch: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether to run both passes of `batch` clips as one.

    'auto' does on an accelerator that tells its free memory, where the clip is small and both fit. On a CPU the two
    passes run one after the other, with the same bits everywhere.

    Raises:
        ValueError: the choice is none of `BATCH_CHOICES`.
    """
    if choice not in BATCH_CHOICES:
        raise ValueError(f"batch_guidance '{choice}' is unknown; use one of {', '.join(BATCH_CHOICES)}")
    if choice != "auto":
        return choice == "on"
    free = free_bytes(device)
    num_tokens = grid[0] * grid[1] * grid[2]
    if free is None or batch * num_tokens > BUSY_TOKENS:
        return False
    return SPARE * activation_bytes(config, num_tokens, dtype, 2 * batch) < free
