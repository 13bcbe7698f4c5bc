"""How well the embedded models do what they are told: random prompts, judged by the recogniser."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..conditioning import ImageConditioning
from ..inputs import Inputs, frame_conditioning
from ..loading import load
from ..pipeline import Models, decode_frames, sample_latents
from ..request import Request, resolve
from ..shapes import VideoShape
from .drawing import draw, random_scene, random_trajectory
from .language import Scene, varied_caption
from .recognise import Sighting, recognise

BATCH = 10


def score_nano(
    *, count: int = 100, seed: int = 1, task: str = "t2v", models: Models | None = None
) -> dict[str, object]:
    """Share of clips that show what the prompt says, by attribute, and of those right in all.

    Args:
        count: Clips to make.
        seed: Of the prompts, the given first frames and the noise.
        task: 't2v', 'i2v' (first frames are drawn) or 't2i'.
        models: Default the embedded ones.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"--n must be at least 1, got {count}")
    models = models or load("nano-video")
    rng = random.Random(f"score-{seed}-{task}")
    hits: dict[str, list[float]] = {}
    bar = tqdm(total=count, desc=f"score {task}", unit="clip", file=sys.stderr)
    for start in range(0, count, BATCH):
        for name, value in _score_batch(models, rng, min(BATCH, count - start), seed * 100_003 + start, task):
            hits.setdefault(name, []).append(value)
        bar.update(min(BATCH, count - start))
    bar.close()
    means = {name: round(sum(values) / len(values), 4) for name, values in hits.items()}
    return {"task": task, "n": count, "seed": seed, "model_hash": models.model_hash, **means}


def _score_batch(models: Models, rng: random.Random, count: int, noise_seed: int, task: str) -> list[tuple[str, float]]:
    scenes = [random_scene(rng) for _ in range(count)]
    prompts = [varied_caption(scene, rng, moving=task != "t2i") for scene in scenes]
    images = [_first_frame(scene, rng, models) for scene in scenes] if task == "i2v" else None
    frames = generate_rows(models, prompts, task, noise_seed, images)
    results = []
    for row, scene in enumerate(scenes):
        results += _judge(recognise(frames[row]), scene, task)
        if images is not None:
            error = (frames[row, 0] - images[row]).square().mean()
            results.append(("first_frame_psnr", float(-10 * torch.log10(error.clamp_min(1e-10)))))
    return results


def _judge(seen: Sighting, scene: Scene, task: str) -> list[tuple[str, float]]:
    right = {
        "color": seen.color == scene.color,
        "background": seen.background == scene.background,
        "shape": seen.shape == scene.shape,
    }
    if task != "t2i":
        right["motion"] = seen.motion == (scene.direction or "still")
    return [(name, float(value)) for name, value in right.items()] + [("all", float(all(right.values())))]


def _first_frame(scene: Scene, rng: random.Random, models: Models) -> Tensor:
    size = models.variant.resolutions[0]
    return draw(scene, random_trajectory(scene, rng, size), models.variant.num_frames, size)[0]


@torch.no_grad()
def generate_rows(
    models: Models, prompts: list[str], task: str, seed: int, images: list[Tensor] | None = None
) -> Tensor:
    """Frames (B, F, H, W, 3) of different prompts in one batch; row i has the noise of seed+i."""
    request = Request(prompt=prompts[0], task=task, seed=seed, batch=len(prompts), image=images[0] if images else None)
    request = resolve(request, models.variant)
    encode = models.text_encoder.encode
    tokens = models.variant.max_text_tokens
    positive = encode(prompts, task=task, max_tokens=tokens)
    negative = encode([request.negative_prompt], task=task, max_tokens=tokens).repeat(len(prompts))
    shape = VideoShape(len(prompts), request.num_frames, request.height, request.width)
    latent_shape = shape.latent_shape(models.variant.vae)
    inputs = Inputs()
    if images is not None:
        rows = [
            frame_conditioning(models, replace(request, image=i), latent_shape._replace(batch=1)) for i in images
        ]
        image = ImageConditioning(
            clean=torch.cat([row.clean for row in rows]), mask=torch.cat([row.mask for row in rows])
        )
        inputs = Inputs(image=image)
    latents = sample_latents(models, request, latent_shape, positive, negative, inputs)
    return torch.cat([decode_frames(models, row[None], request.vae_budget_bytes) for row in latents])
