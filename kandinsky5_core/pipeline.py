"""Prompt to frames: the whole way in one short function.

`load` gathers the models, `Request` says what is wanted, `generate` makes it. The command line, the nodes and
the trainers' validation call the same functions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .attention.engines import ChosenEngine, Engines, probe_engines
from .attention.nabla import resolve_attention
from .caching import choose_cache
from .canvas import extend_edges
from .clips import extended, looped
from .conditioning import TextConditioning
from .config import GUIDANCE_OFF, Variant, variant_for_size
from .dit.model import DiffusionTransformer
from .dit.plan import plan_visual
from .inputs import Inputs, encode_inputs
from .memory.block_swap import BlockSwap
from .memory.options import MemoryOptions
from .request import Request, resolve, settings
from .sampling.guidance import guided_velocity, hold_given
from .sampling.guidance_batch import batches_guidance
from .sampling.noise import initial_noise
from .sampling.samplers import SAMPLERS, OnStep
from .sampling.schedule import flow_schedule
from .sampling.step_cache import NewCache
from .shapes import LatentShape, VideoShape
from .text.encoder import TextEncoder
from .vae.flux import FluxVAE
from .vae.hunyuan.model import HunyuanVAE
from .vae.latents import unscale_latents
from .vae.pass_plan import plan_pass
from .vae.within import decode_within

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of one variant and where they run."""

    variant: Variant
    dit: DiffusionTransformer
    text_encoder: TextEncoder
    vae: HunyuanVAE | FluxVAE
    device: torch.device
    dtype: torch.dtype
    variant_named: bool = True
    """False: `variant` is a guess among rows of one checkpoint, and the size asked for decides."""
    model_hash: str = ""
    """Short content hash of the DiT's file."""
    weights: Path | None = None
    """The DiT's file or folder; calibrated cache ratios lie beside it."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    """What the networks were loaded with."""
    swap: BlockSwap | None = None
    """Of the DiT, where blocks of it are swapped."""

    @cached_property
    def engines(self) -> Engines:
        """The attention engines of the device, probed at the first call."""
        return probe_engines(self.device)

    @contextmanager
    def on_device(self, model: nn.Module | TextEncoder) -> Iterator[None]:
        """The network on the device for its stage, and back to the CPU after it unless all stay there."""
        placed = self.swap if self.swap is not None and model is self.dit else model
        placed.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu" and self.memory.offload == "stage":
                placed.to("cpu")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made, and how."""

    frames: Tensor
    """(B, F, H, W, 3) fp32 in [0, 1]."""
    settings: dict[str, object]
    """Every value that was used."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""
    cache: dict[str, object] = field(default_factory=dict)
    """What a step cache skipped, or why it was off; empty where none was asked for."""


def fitting_variant(request: Request, variant: Variant) -> Variant:
    """The row of the same checkpoint for the size that was asked for: HD settings for HD sizes."""
    if request.width is None or request.height is None:
        return variant
    fitting = variant_for_size(variant, request.height, request.width)
    if fitting != variant:
        log.info("%dx%d takes the settings of %s", request.width, request.height, fitting.name)
    return fitting


@torch.no_grad()
def generate(
    models: Models, request: Request, on_step: OnStep | None = None, new_cache: NewCache | None = None
) -> Result:
    """Make frames from a prompt, and from what else the request gives.

    Args:
        models: From `load`.
        request: What to make.
        on_step: Called after each sampling step with (step, steps, latents); raise in it to cancel.
        new_cache: Makes the step cache of each run, a `Calibration.start` say; default as the request says.

    Raises:
        ValueError: the request does not fit the variant, before any work.
    """
    if not models.variant_named:
        models = replace(models, variant=fitting_variant(request, models.variant))
    request = resolve(request, models.variant)
    choose_engine(request, models.variant, models.engines, models.dtype)
    check_vae_budget(request, models.variant, _dtype_of(models.vae))
    clock = Clock()
    chosen = choose_cache(request, models.variant, models.weights)
    if chosen is not None and chosen.off is not None:
        log.warning("the step cache is off: %s", chosen.off)
        request, new_cache = replace(request, cache="off"), None
    elif chosen is not None:
        new_cache = new_cache or chosen.start

    def make(part: Request) -> Tensor:
        return run(models, part, clock, on_step, new_cache)

    if request.extend is not None:
        frames = extended(request, make)
    elif request.loop:
        frames = looped(request, models.variant.vae.temporal_ratio, make)
    else:
        frames = make(request)
    return Result(
        frames=frames, settings={**settings(request, models.variant), **clock.told, **models.memory.told()},
        seconds=clock.seconds, cache={} if chosen is None else chosen.told(),
    )  # fmt: skip


def run(
    models: Models, request: Request, clock: Clock, on_step: OnStep | None = None, new_cache: NewCache | None = None
) -> Tensor:
    """One resolved request from prompt to frames (B, F, H, W, 3) fp32 in [0, 1] on the CPU."""
    latent_shape = latent_shape_of(request, models.variant)
    with clock.stage("text"), models.on_device(models.text_encoder):
        positive, negative = encode_prompts(models, request)
    inputs = Inputs()
    if request.given is not None:
        with clock.stage("vae_encode"), models.on_device(models.vae):
            inputs = encode_inputs(models, request, latent_shape, clock.told)
    with clock.stage("dit"), models.on_device(models.dit):
        latents = sample_latents(
            models, request, latent_shape, positive, negative, inputs, on_step, new_cache, clock.told
        )
    with clock.stage("vae_decode"), models.on_device(models.vae):
        return inputs.finish(decode_frames(models, latents, request.vae_budget_bytes, clock.told))


def latent_shape_of(request: Request, variant: Variant) -> LatentShape:
    """Of a resolved request."""
    shape = VideoShape(request.batch, request.num_frames, request.height, request.width)
    return shape.latent_shape(variant.vae)


def check_vae_budget(request: Request, variant: Variant, dtype: torch.dtype) -> None:
    """That the VAE can work in the budget of a resolved request: it comes last, when all else is done.

    Raises:
        ValueError: the budget holds no way at all.
    """
    for direction in ("decode",) if request.given is None else ("encode", "decode"):
        plan_pass(
            latent_shape_of(request, variant), variant.vae, direction=direction,
            budget_bytes=request.vae_budget_bytes, bytes_per_element=dtype.itemsize,
        )  # fmt: skip


def encode_prompts(models: Models, request: Request) -> tuple[TextConditioning, TextConditioning | None]:
    """Positive and, where guidance is on, negative text for every row of the batch."""
    prompts = [request.prompt]
    if abs(request.guidance_scale - 1) > GUIDANCE_OFF:
        prompts.append(request.negative_prompt)
    images = None
    if request.task == "i2i" and request.image is not None:
        images = [shown_image(request)]
    rows = [
        models.text_encoder.encode(
            [prompt], task=request.task, max_tokens=models.variant.max_text_tokens, images=images,
            edit_template=request.edit_template,
        )
        .to(models.device)
        .repeat(request.batch)
        for prompt in prompts
    ]
    rows = [replace(row, embeds=row.embeds.to(models.dtype), pooled=row.pooled.to(models.dtype)) for row in rows]
    return rows[0], rows[1] if len(rows) > 1 else None


def shown_image(request: Request) -> Tensor:
    """The picture to edit as the text encoder sees it: (height, width, 3) of the model's frame, in [0, 1]."""
    extended_edges = extend_edges(request.image[None].float(), request.outpaint)
    return request.canvas().to_work(extended_edges)[0].clamp(0, 1)


def sample_latents(
    models: Models, request: Request, latent_shape: LatentShape, positive: TextConditioning,
    negative: TextConditioning | None, inputs: Inputs | None = None, on_step: OnStep | None = None,
    new_cache: NewCache | None = None, told: dict[str, object] | None = None,
) -> Tensor:  # fmt: skip
    """Scaled latents (B, C, T, h, w) fp32 from noise, or from what is given with noise on it.

    `new_cache` makes the step cache of this run; without it every step is computed. What was decided on the way goes
    into `told`.
    """
    inputs, variant = inputs or Inputs(), models.variant
    nabla = resolve_attention(request.attention, variant.nabla)
    grid = latent_shape.token_grid(variant.dit.patch_size)
    engine = choose_engine(request, variant, models.engines, models.dtype)
    plan = plan_visual(variant.dit, grid, variant.rope_scale, nabla, models.device, engine.attend)
    batched = batches_guidance(
        request.batch_guidance, variant.dit, grid, batch=request.batch, dtype=models.dtype, device=models.device
    )
    noise = latents = initial_noise(latent_shape, request.seed).to(models.device)
    sigmas = flow_schedule(request.num_steps, request.shift, request.denoise)
    cache = None if new_cache is None else new_cache(sigmas.tolist())
    sigmas = sigmas.to(models.device)
    velocity_fn = guided_velocity(
        models.dit, positive, negative, request.guidance_scale, plan, inputs.image, cache, batched=batched
    )
    if inputs.partial is not None:
        velocity_fn = inputs.partial.restrict(velocity_fn, noise, request.shift)
        latents = inputs.partial.start(noise, sigmas[0])
    latents = SAMPLERS[request.sampler](velocity_fn, latents, sigmas, on_step)
    if told is not None:
        told["attention_engine"] = engine.told if plan.nabla is None else plan.nabla.told
        told["guidance_batched"] = batched and negative is not None
    return hold_given(latents, inputs.image)


def choose_engine(request: Request, variant: Variant, engines: Engines, dtype: torch.dtype) -> ChosenEngine:
    """The engine for dense attention that the request names.

    Raises:
        ValueError: it cannot be used here; names the package.
    """
    return engines.choose(request.attention_engine, head_dim=variant.dit.head_dim, dtype=dtype)


def decode_frames(
    models: Models, latents: Tensor, budget_bytes: int, told: dict[str, object] | None = None
) -> Tensor:
    """Scaled latents (B, C, T, h, w) to frames (B, F, H, W, 3) fp32 in [0, 1] on the CPU.

    The way that the VAE took goes into `told`.
    """
    unscaled = unscale_latents(latents, models.variant.vae).to(_dtype_of(models.vae))
    pixels = decode_within(models.vae, unscaled, budget_bytes, told=told)
    return ((pixels.float().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.told: dict[str, object] = {}
        """What was decided on the way, for the settings."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
