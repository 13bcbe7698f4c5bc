"""Plans as text for people, as Markdown tables and as values for JSON."""

from __future__ import annotations

from collections.abc import Sequence

from .choose import BUDGETS, GIB, STAGE_NAMES, Choice, DoesNotFitError, choose
from .estimate import Job, Settings
from .options import AS_IS


def settings_text(settings: Settings, total_blocks: int) -> str:
    """Such as 'networks wait on the CPU, text encoder in int8, 12 of 32 blocks swapped'."""
    memory = settings.memory
    parts = ["all networks on the device" if memory.offload == "none" else "networks wait on the CPU"]
    if memory.text_weights != AS_IS:
        parts.append(f"text encoder in {memory.text_weights}")
    if memory.weights != AS_IS:
        parts.append(f"DiT in {memory.weights}")
    if memory.swap_blocks:
        parts.append(f"{memory.swap_blocks} of {total_blocks} blocks swapped")
    parts.append(f"VAE budget {settings.vae_budget_bytes / GIB:g} GiB")
    if settings.guidance_batched:
        parts.append("guidance in one batch")
    return ", ".join(parts)


def options_text(settings: Settings) -> str:
    """The same as options of the command line; those at their defaults are left out."""
    memory = settings.memory
    options = [
        f"--weights {memory.weights}" if memory.weights != AS_IS else "",
        f"--text-weights {memory.text_weights}" if memory.text_weights != AS_IS else "",
        f"--swap-blocks {memory.swap_blocks}" if memory.swap_blocks else "",
        f"--offload {memory.offload}" if memory.offload != "stage" else "",
        f"--vae-budget {settings.vae_budget_bytes / GIB:g}",
        f"--batch-guidance {'on' if settings.guidance_batched else 'off'}",
    ]
    return " ".join(filter(None, options))


def job_text(job: Job) -> str:
    """What is to be made, in a line."""
    shape = job.shape
    attention = "dense" if job.nabla is None else "NABLA"
    frames = "1 frame" if shape.frames == 1 else f"{shape.frames} frames"
    batch = f", batch {shape.batch}" if shape.batch > 1 else ""
    return (
        f"{job.variant.name}, {job.task}: {shape.width}x{shape.height}, {frames}{batch}; {job.num_tokens} tokens, "
        f"{attention}, {'guided' if job.guided else 'without guidance'}"
    )


def choice_text(choice: Choice) -> str:
    """A table of the stages, the settings, and why they are not the plain ones."""
    lines = [f"{'stage':<14}{'weights':>9}{'work':>8}{'device':>9}{'CPU':>8}   GiB"]
    for need in choice.needs:
        sizes = [size / GIB for size in (need.weights, need.work, need.device, need.cpu)]
        name = STAGE_NAMES[need.stage]
        lines.append(f"{name:<14}{sizes[0]:>9.2f}{sizes[1]:>8.2f}{sizes[2]:>9.2f}{sizes[3]:>8.2f}")
    budget, free = choice.budget_bytes / GIB, choice.reserve_bytes / GIB
    lines.append(
        f"most: {choice.peak.device / GIB:.2f} GiB in {STAGE_NAMES[choice.peak.stage]}, of {budget - free:.2f} GiB "
        f"({budget:.4g} less {free:.2f} kept free); CPU {choice.cpu_peak / GIB:.2f}"
    )
    total = choice.job.variant.dit.num_visual_blocks
    lines.append(f"settings: {settings_text(choice.settings, total)}")
    lines.append(f"options: {options_text(choice.settings)}")
    lines += [f"because: {reason}" for reason in choice.reasons]
    return "\n".join(lines)


def budget_rows(job: Job, *, budgets: Sequence[int] = BUDGETS, cpu_bytes: int | None = None) -> list[tuple[str, ...]]:
    """For each budget in GiB: its name, the device's and the CPU's peak, and the settings or why there are none."""
    rows = []
    for budget in budgets:
        try:
            choice = choose(job, budget_bytes=budget * GIB, cpu_bytes=cpu_bytes)
        except DoesNotFitError as error:
            rows.append((f"{budget} GB", "-", "-", f"does not fit: {str(error).split(': ', 1)[1]}"))
            continue
        told = settings_text(choice.settings, job.variant.dit.num_visual_blocks)
        peak, cpu = choice.peak.device / GIB, choice.cpu_peak / GIB
        rows.append((f"{budget} GB", f"{peak:.1f}", f"{cpu:.1f}", told))
    return rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def budgets_text(job: Job, *, cpu_bytes: int | None = None) -> str:
    """The table of all budgets."""
    return markdown(("card", "device GiB", "CPU GiB", "settings"), budget_rows(job, cpu_bytes=cpu_bytes))


def choice_values(choice: Choice) -> dict[str, object]:
    """Everything of a choice, for JSON."""
    memory = choice.settings.memory
    return {
        "variant": choice.job.variant.name, "task": choice.job.task, "shape": list(choice.job.shape),
        "tokens": choice.job.num_tokens, "budget_bytes": choice.budget_bytes, "reserve_bytes": choice.reserve_bytes,
        "settings": {
            **vars(memory), "vae_budget_bytes": choice.settings.vae_budget_bytes,
            "guidance_batched": choice.settings.guidance_batched,
        },
        "options": options_text(choice.settings),
        "stages": [
            {"stage": need.stage, "weights": need.weights, "work": need.work, "device": need.device, "cpu": need.cpu}
            for need in choice.needs
        ],
        "peak_bytes": choice.peak.device, "cpu_bytes": choice.cpu_peak, "reasons": list(choice.reasons),
    }  # fmt: skip
