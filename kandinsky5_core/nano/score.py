"""How well the embedded models do what they are told: random tasks, judged by the recogniser."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from ..caching import choose_cache
from ..conditioning import ImageConditioning, TextConditioning, joined
from ..config import variant as find_variant
from ..inputs import Inputs, encode_inputs
from ..loading import load
from ..memory.options import MemoryOptions
from ..pipeline import Models, decode_frames, encode_prompts, generate, sample_latents
from ..request import Request, resolve
from ..sampling.partial import PartialNoise
from ..sampling.step_cache import NewCache
from ..shapes import LatentShape, VideoShape
from .cases import CASES, REQUEST_TASKS, Case

BATCH = 10


def score_nano(
    *, count: int = 100, seed: int = 1, task: str = "t2v", models: Models | str | None = None,
    options: Mapping[str, object] | None = None, memory: MemoryOptions | None = None,
) -> dict[str, object]:  # fmt: skip
    """Mean marks over random cases of a task, by name.

    Args:
        count: Cases.
        seed: Of the cases and of the noise.
        task: A key of `CASES`.
        models: Or the name of an embedded model; default the one that is made for the task.
        options: Fields of `Request` for every case, such as a step cache.
        memory: How an embedded model is loaded; `Models` come with theirs.

    Raises:
        ValueError: count below 1, an unknown task, or one that the model does not do.
    """
    if count < 1:
        raise ValueError(f"--n must be at least 1, got {count}")
    if task not in CASES:
        raise ValueError(f"unknown task '{task}'; use one of {', '.join(CASES)}")
    models = _models_for(task, models, memory)
    rng = random.Random(f"score-{seed}-{task}")
    cases = [CASES[task][1](rng, models.variant) for _ in range(count)]
    cases = [replace(case, request=replace(case.request, **(options or {}))) for case in cases]
    cases.sort(key=_size)
    marks: dict[str, list[float]] = {}
    with tqdm(total=count, desc=f"score {task}", unit="case", file=sys.stderr) as bar:
        for number, batch in enumerate(_batches(cases)):
            for case, frames in zip(batch, answers(models, batch, seed * 100_003 + number * BATCH), strict=True):
                for key, value in case.judge(frames).items():
                    marks.setdefault(key, []).append(value)
            bar.update(len(batch))
    means = {key: round(sum(values) / len(values), 4) for key, values in marks.items()}
    return {"task": task, "n": count, "seed": seed, "model": models.variant.name,
            "model_hash": models.model_hash, **(options or {}), **models.memory.told(), **means}  # fmt: skip


def _models_for(task: str, models: Models | str | None, memory: MemoryOptions | None) -> Models:
    models = models or CASES[task][0]
    variant = find_variant(models) if isinstance(models, str) else models.variant
    if REQUEST_TASKS.get(task, task) not in variant.tasks:
        raise ValueError(f"{variant.name} does not do task '{task}'; use {CASES[task][0]}")
    return load(models, memory=memory) if isinstance(models, str) else models


def _size(case: Case) -> tuple[int, int]:
    return case.request.height or 0, case.request.width or 0


def _batches(cases: list[Case]) -> list[list[Case]]:
    """Cases of one size each, at most `BATCH`."""
    groups = [list(group) for _, group in groupby(cases, key=_size)]
    return [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]


def answers(models: Models, cases: Sequence[Case], seed: int) -> list[Tensor]:
    """Frames (F, H, W, 3) for every case; row i has the noise of seed+i."""
    requests = [replace(case.request, seed=seed + row) for row, case in enumerate(cases)]
    if any(request.loop or request.extend is not None for request in requests):
        return [generate(models, request).frames[0] for request in requests]
    return generate_rows(models, requests)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Different prompts and pictures, encoded as one batch."""

    request: Request
    """The first one, for the batch."""
    shape: LatentShape
    positive: TextConditioning
    negative: TextConditioning | None
    inputs: list[Inputs]


@torch.no_grad()
def generate_rows(models: Models, requests: Sequence[Request]) -> list[Tensor]:
    """Frames of different prompts and pictures in one batch; sizes and settings are the first request's."""
    rows = encode_rows(models, requests)
    chosen = choose_cache(rows.request, models.variant, models.weights)
    return decode_rows(models, rows, sample_rows(models, rows, chosen.start if chosen and not chosen.off else None))


@torch.no_grad()
def encode_rows(models: Models, requests: Sequence[Request]) -> Rows:
    """Everything before sampling."""
    requests = [resolve(request, models.variant) for request in requests]
    first = replace(requests[0], batch=len(requests))
    shape = VideoShape(1, first.num_frames, first.height, first.width)
    latent_shape = shape.latent_shape(models.variant.vae)
    texts = [encode_prompts(models, request) for request in requests]
    positive = joined([text[0].trimmed() for text in texts])
    negative = None if texts[0][1] is None else joined([text[1].trimmed() for text in texts])
    inputs = [encode_inputs(models, request, latent_shape) for request in requests]
    latent_shape = latent_shape._replace(batch=first.batch)
    return Rows(request=first, shape=latent_shape, positive=positive, negative=negative, inputs=inputs)


@torch.no_grad()
def sample_rows(models: Models, rows: Rows, new_cache: NewCache | None = None) -> Tensor:
    """Scaled latents of every row."""
    return sample_latents(
        models, rows.request, rows.shape, rows.positive, rows.negative, stacked(rows.inputs), new_cache=new_cache
    )


@torch.no_grad()
def decode_rows(models: Models, rows: Rows, latents: Tensor) -> list[Tensor]:
    """Frames (F, H, W, 3) of every row."""
    frames = [decode_frames(models, row[None], rows.request.vae_budget_bytes) for row in latents]
    return [given.finish(made)[0] for given, made in zip(rows.inputs, frames, strict=True)]


def stacked(rows: Sequence[Inputs]) -> Inputs:
    """What the DiT and the sampler are given for each row, as one batch."""
    images = [row.image for row in rows if row.image is not None]
    partials = [row.partial for row in rows if row.partial is not None]
    image = partial = None
    if images:
        image = ImageConditioning(
            clean=_cat([image.clean for image in images]), source=_cat([image.source for image in images]),
            mask=_cat([image.mask for image in images]),
        )  # fmt: skip
    if partials:
        partial = PartialNoise(
            clean=_cat([partial.clean for partial in partials]),
            strength=_cat([partial.strength for partial in partials]),
        )
    return Inputs(image=image, partial=partial)


def _cat(rows: Sequence[Tensor | None]) -> Tensor | None:
    return None if rows[0] is None else torch.cat(list(rows))
