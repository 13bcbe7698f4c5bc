"""A request that fits a device: the planner's settings put in place of those that were left open."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from .attention.nabla import resolve_attention
from .config import GUIDANCE_OFF, Variant
from .memory.choose import GIB, Choice, choose
from .memory.estimate import Job
from .memory.options import MemoryOptions
from .request import Request
from .shapes import VideoShape

log = logging.getLogger(__name__)

AUTO = "auto"


def job_of_request(
    request: Request, variant: Variant, dtype: torch.dtype, *, enhanced: bool = False, compiled: bool = False
) -> Job:  # fmt: skip
    """A resolved request as the planner sees it.

    Args:
        enhanced: The text encoder writes the prompt out first.
        compiled: With compiled blocks.
    """
    given = request.video if request.video is not None else request.extend
    return Job(
        variant=variant, shape=VideoShape(request.batch, request.num_frames, request.height, request.width),
        task=request.task, guided=abs(request.guidance_scale - 1) > GUIDANCE_OFF,
        nabla=resolve_attention(request.attention, variant.nabla), element_size=dtype.itemsize,
        cached=request.cache != "off", enhanced=enhanced, whole=compiled,
        given_frames=0 if given is None else request.num_frames,
    )  # fmt: skip


def fitted(request: Request, job: Job, budget: int) -> tuple[Request, MemoryOptions, Choice]:
    """The request and the memory options with which the job fits a device of so many bytes, and why they are those.

    Raises:
        ValueError: nothing fits (DoesNotFitError).
    """
    choice = choose(job, budget_bytes=budget)
    chosen = choice.settings
    request = replace(
        request, vae_budget_bytes=chosen.vae_budget_bytes, batch_guidance="on" if chosen.guidance_batched else "off"
    )
    return request, chosen.memory, choice


def budget_bytes(told: str, device: torch.device) -> int:
    """A budget in GiB as it was told, or for 'auto' the memory that the device has; never more than that.

    Raises:
        ValueError: no such size, or the device does not tell its memory.
    """
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    if told == AUTO:
        if there is None:
            raise ValueError(f"--budget auto: {device.type} does not tell its memory; give it in GB, such as 16")
        return there
    try:
        size = float(told)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"--budget {told} is not a size in GB; use auto, or 8, 12, 16, 24, 48 or 80, say")
    if there is not None and size * GIB > there:
        log.warning("--budget %s: the device has %.1f GiB; the job is fitted into those", told, there / GIB)
        return there
    return round(size * GIB)
