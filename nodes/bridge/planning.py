"""The planner's text for a node, and this card's free memory."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management

from ...kandinsky5_core.config import VARIANTS
from ...kandinsky5_core.memory.choose import GIB, DoesNotFitError, choose
from ...kandinsky5_core.memory.estimate import Settings, default_job
from ...kandinsky5_core.memory.options import AS_IS
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
    # Weights that ComfyUI casts or brings in at every call serve all tokens at once.
    job = replace(job, whole=True)
    if not budget:
        return f"{job_text(job)}\n{budgets_text(job)}"
    try:
        choice = choose(job, budget_bytes=round(budget * GIB))
    except DoesNotFitError as error:
        return f"{job_text(job)}\n{error}"
    return f"{job_text(job)}\n{choice_text(choice)}\nin ComfyUI: {nodes_text(choice.settings)}"


def nodes_text(settings: Settings) -> str:
    """The same settings as inputs of nodes; ComfyUI itself moves networks and computes guidance."""
    memory = settings.memory
    kinds = {"fp8": "fp8_e4m3fn", "int8": "int8"}
    parts = [
        f"weight_dtype {kinds[memory.weights]} in the loader" if memory.weights != AS_IS else "",
        f"text_weights {memory.text_weights} in the loader" if memory.text_weights != AS_IS else "",
        f"blocks {memory.swap_blocks} in Kandinsky 5 Block Swap" if memory.swap_blocks else "",
        f"tile_budget {settings.vae_budget_bytes / GIB:g} in Kandinsky 5 Decode Video",
    ]
    return ", ".join(filter(None, parts))
