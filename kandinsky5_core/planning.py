"""The `plan` command: what a job will need, before anything is loaded. It imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import replace

from .config import NablaConfig, variant
from .memory.choose import BUDGETS, GIB, DoesNotFit, choose
from .memory.estimate import Job, default_job
from .memory.told import budgets_text, choice_text, choice_values, job_text

ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def job_of(args: argparse.Namespace) -> Job:
    """The job that the options describe.

    Raises:
        ValueError: names the option that does not fit the variant.
    """
    row = variant(args.variant)
    job = default_job(
        row, batch=args.batch, frames=args.frames or 0, height=args.height or 0, width=args.width or 0,
        task=args.task or "",
    )  # fmt: skip
    guided = job.guided if args.guidance is None else args.guidance != 1
    nabla = {"auto": row.nabla, "dense": None, "nabla": row.nabla or NablaConfig(mass=0.9)}[args.attention]
    return replace(job, guided=guided, nabla=nabla, element_size=ELEMENT_SIZES[args.dtype])


def plan_command(args: argparse.Namespace) -> tuple[str, object]:
    """The plan as text and as values: for one budget, or the table of all."""
    job = job_of(args)
    cpu_bytes = None if args.cpu_memory is None else round(args.cpu_memory * GIB)
    if args.budget is not None:
        if args.budget <= 0:
            raise ValueError(f"--budget {args.budget:g} is not a size in GB; use 8, 12, 16, 24, 48 or 80, say")
        choice = choose(job, budget_bytes=round(args.budget * GIB), cpu_bytes=cpu_bytes)
        return f"{job_text(job)}\n{choice_text(choice)}", choice_values(choice)
    return f"{job_text(job)}\n{budgets_text(job, cpu_bytes=cpu_bytes)}", [
        _values(job, budget * GIB, cpu_bytes) for budget in BUDGETS
    ]


def _values(job: Job, budget_bytes: int, cpu_bytes: int | None) -> dict[str, object]:
    try:
        return choice_values(choose(job, budget_bytes=budget_bytes, cpu_bytes=cpu_bytes))
    except DoesNotFit as error:
        return {"budget_bytes": budget_bytes, "does_not_fit": str(error)}
