"""The `plan` command: what a job will need, before anything is loaded. It imports no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from math import prod
from pathlib import Path

from .config import VARIANTS, NablaConfig, Variant, variant
from .memory.choose import BUDGETS, GIB, DoesNotFitError, choose
from .memory.estimate import Job, default_job
from .memory.options import AS_IS
from .memory.told import budgets_text, choice_text, choice_values, job_text
from .memory.told_training import training_text, training_values
from .memory.training import TrainingJob
from .shapes import VideoShape

ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
DEFAULT_RANK = 32
"""Of `train.config.LoraConfig`."""


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
    return replace(
        job, guided=guided, nabla=nabla, element_size=ELEMENT_SIZES[args.dtype], cached=args.cache, whole=args.compile
    )


def plan_command(args: argparse.Namespace) -> tuple[str, object]:
    """The plan as text and as values: for one budget, or the table of all."""
    if args.train is not None:
        return train_command(args.train)
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


def train_command(path: Path) -> tuple[str, object]:
    """What a training job's step will need, by `job.json` alone, with the report's formulas beside it.

    Raises:
        ValueError: no such job, or a variant that has to be named.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"--train {path} does not hold a training job; give a job.json")
    model = values.get("variant") or values.get("model", "")
    if model not in VARIANTS:
        raise ValueError(f"--train {path}: model '{model}' is a file; name its variant with the key 'variant'")
    row, fit, data = variant(model), values.get("fit", {}), values.get("data", {})
    shape = _training_shape(row, data)
    job = TrainingJob(
        config=row.dit, num_tokens=prod(shape.latent_shape(row.vae).token_grid(row.dit.patch_size)),
        rank=(values.get("lora") or {}).get("rank", DEFAULT_RANK) if values.get("lora") is not None else 0,
        element_size=ELEMENT_SIZES.get(values.get("dtype", ""), 0), base_weights=values.get("base_weights") or AS_IS,
        checkpointing=values.get("gradient_checkpointing", False), optimizer=fit.get("optimizer", "adamw"),
        ema=fit.get("ema_decay", 1) > 0,
    )  # fmt: skip
    frames = shape.latent_shape(row.vae).frames
    return training_text(job, row, shape, frames), training_values(job, frames * shape.height * shape.width)


def _training_shape(row: Variant, data: dict[str, int]) -> VideoShape:
    """The largest clip that is trained on: the batches' budget of latent frames is one of these by default."""
    height, width = row.resolutions[0]
    if area := data.get("area", 0):
        multiple = 2 * row.vae.spatial_ratio
        scale = (area / (height * width)) ** 0.5
        height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
    return VideoShape(1, data.get("max_frames", 0) or row.num_frames, height, width)


def _values(job: Job, budget_bytes: int, cpu_bytes: int | None) -> dict[str, object]:
    try:
        return choice_values(choose(job, budget_bytes=budget_bytes, cpu_bytes=cpu_bytes))
    except DoesNotFitError as error:
        return {"budget_bytes": budget_bytes, "does_not_fit": str(error)}
