"""A request that fits a device: the planner's settings put in place of those that cost nothing to leave open."""

from __future__ import annotations

from dataclasses import replace

import torch

from .attention.nabla import resolve_attention
from .config import GUIDANCE_OFF, Variant
from .memory.choose import GIB, Choice, choose
from .memory.estimate import Job
from .memory.options import MemoryOptions
from .request import Request
from .shapes import VideoShape


def job_of_request(request: Request, variant: Variant, dtype: torch.dtype) -> Job:
    """A resolved request as the planner sees it."""
    return Job(
        variant=variant, shape=VideoShape(request.batch, request.num_frames, request.height, request.width),
        task=request.task, guided=abs(request.guidance_scale - 1) > GUIDANCE_OFF,
        nabla=resolve_attention(request.attention, variant.nabla), element_size=dtype.itemsize,
    )  # fmt: skip


def fitted(
    request: Request, variant: Variant, dtype: torch.dtype, budget_gib: float
) -> tuple[Request, MemoryOptions, Choice]:
    """The request and the memory options with which it fits a device of so many GiB, and why they are those.

    Raises:
        ValueError: no such budget, or nothing fits it (DoesNotFitError).
    """
    if not budget_gib > 0:
        raise ValueError(f"--budget {budget_gib:g} is not a size in GB; use 8, 12, 16, 24, 48 or 80, say")
    choice = choose(job_of_request(request, variant, dtype), budget_bytes=round(budget_gib * GIB))
    chosen = choice.settings
    request = replace(
        request, vae_budget_bytes=chosen.vae_budget_bytes, batch_guidance="on" if chosen.guidance_batched else "off"
    )
    return request, chosen.memory, choice
