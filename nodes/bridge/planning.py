"""The planner's text for a node, and this card's free memory."""

from __future__ import annotations

import comfy.model_management

from ...kandinsky5_core.config import VARIANTS
from ...kandinsky5_core.memory.choose import GIB, DoesNotFitError, choose
from ...kandinsky5_core.memory.estimate import default_job
from ...kandinsky5_core.memory.told import budgets_text, choice_text, job_text


def free_memory_gib() -> float:
    """Of the card ComfyUI computes on, what other programs leave; 0 on a CPU."""
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.is_device_cpu(device):
        return 0.0
    return comfy.model_management.get_free_memory(device) / GIB


def plan_text(name: str, width: int, height: int, frames: int, batch: int, budget: float) -> str:
    """Stages and settings for a budget in GiB; 0: a table of all usual ones. What does not fit is said, not raised.

    Raises:
        ValueError: a size that the variant does not take.
    """
    job = default_job(VARIANTS[name], batch=batch, frames=frames, height=height, width=width)
    if not budget:
        return f"{job_text(job)}\n{budgets_text(job)}"
    try:
        choice = choose(job, budget_bytes=round(budget * GIB))
    except DoesNotFitError as error:
        return f"{job_text(job)}\n{error}"
    return f"{job_text(job)}\n{choice_text(choice)}"
