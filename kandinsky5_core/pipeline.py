"""Prompt to frames: the whole way in one short function.

`load` gathers the models, `Request` says what is wanted, `generate` makes it. The command line, the nodes and
the trainers' validation call the same functions.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .attention.nabla import resolve_attention
from .conditioning import ImageConditioning, TextConditioning
from .config import Variant, variant_for_size
from .dit.model import DiffusionTransformer
from .dit.plan import plan_visual
from .sampling.first_frame import normalise_first_frames
from .sampling.guidance import GUIDANCE_OFF, guided_velocity, hold
from .sampling.noise import initial_noise
from .sampling.samplers import SAMPLERS, OnStep
from .sampling.schedule import flow_schedule
from .shapes import LatentShape, VideoShape, nearest_resolution, size_from_image
from .text.encoder import TextEncoder
from .vae.flux import FluxVAE
from .vae.hunyuan.model import HunyuanVAE
from .vae.latents import scale_latents, unscale_latents
from .vae.tiling import DEFAULT_BUDGET_BYTES, decode_tiled, encode_tiled, plan_decode, plan_encode

log = logging.getLogger(__name__)

ATTENTIONS = ("auto", "dense", "nabla")


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

    @contextmanager
    def on_device(self, model: nn.Module | TextEncoder) -> Iterator[None]:
        """One network at a time on the device: moved there for its stage and back to the CPU after it."""
        model.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                model.to("cpu")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. None means the variant's own default; `settings` shows what that came to."""

    prompt: str
    task: str = "t2v"
    negative_prompt: str | None = None
    image: Tensor | None = None
    """(H, W, 3) in [0, 1]: for i2v the first frame, for i2i the picture to edit (without it i2i is t2i)."""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    sampler: str = "euler"
    seed: int = 0
    batch: int = 1
    attention: str = "auto"
    vae_budget_bytes: int = DEFAULT_BUDGET_BYTES
    """Memory that one VAE tile may take; decides the tiling, and with it the result."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made, and how."""

    frames: Tensor
    """(B, F, H, W, 3) fp32 in [0, 1]."""
    settings: dict[str, object]
    """Every value that was used."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""


def resolve(request: Request, variant: Variant) -> Request:
    """The request with every None filled from the variant, checked before anything is loaded.

    Raises:
        ValueError: names the option, its value and what would do.
    """
    _check_options(request, variant)
    height, width = _size(request, variant)
    still = request.task in ("t2i", "i2i")
    num_frames = request.num_frames if request.num_frames is not None else (1 if still else variant.num_frames)
    if still and num_frames != 1:
        raise ValueError(f"task {request.task} makes one frame, got frames {num_frames}")
    if request.task == "i2v" and num_frames <= variant.vae.temporal_ratio:
        raise ValueError(f"task i2v needs at least {variant.vae.temporal_ratio + 1} frames, got {num_frames}")
    VideoShape(request.batch, num_frames, height, width).check(variant.vae)
    defaults = variant.sampling
    resolved = replace(
        request, width=width, height=height, num_frames=num_frames,
        num_steps=_or(request.num_steps, defaults.num_steps),
        guidance_scale=_or(request.guidance_scale, defaults.guidance_scale),
        shift=_or(request.shift, defaults.shift),
        negative_prompt=_or(request.negative_prompt, "" if still else defaults.negative_prompt),
    )  # fmt: skip
    flow_schedule(resolved.num_steps, resolved.shift)
    return resolved


def fitting_variant(request: Request, variant: Variant) -> Variant:
    """The row of the same checkpoint for the size that was asked for: HD settings for HD sizes."""
    if request.width is None or request.height is None:
        return variant
    fitting = variant_for_size(variant, request.height, request.width)
    if fitting != variant:
        log.info("%dx%d takes the settings of %s", request.width, request.height, fitting.name)
    return fitting


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _check_options(request: Request, variant: Variant) -> None:
    for name, value, known in (
        ("task", request.task, variant.tasks), ("sampler", request.sampler, tuple(SAMPLERS)),
        ("attention", request.attention, ATTENTIONS),
    ):  # fmt: skip
        if value not in known:
            what = f"{name} '{value}'" + (f" with {variant.name}" if name == "task" else "")
            raise ValueError(f"{what} is not possible; use one of {', '.join(known)}")
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say what should be seen")
    if request.task == "i2v" and request.image is None:
        raise ValueError("task i2v needs an image: give the first frame (--image FILE)")
    if request.task in ("t2v", "t2i") and request.image is not None:
        raise ValueError(f"task {request.task} takes no image; use i2v to start from one or i2i to edit one")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed} is out of range; use 0 to 2^63-1")


def _size(request: Request, variant: Variant) -> tuple[int, int]:
    """(height, width): as asked, else from the image, else the variant's first resolution."""
    if (request.width is None) != (request.height is None):
        given = "width" if request.height is None else "height"
        raise ValueError(f"only {given} was given; give width and height, or neither")
    if request.width is not None and request.height is not None:
        return request.height, request.width
    if request.image is not None:
        height, width = request.image.shape[:2]
        if request.task == "i2i":
            return nearest_resolution(height, width, variant.resolutions)
        return size_from_image(height, width, max_area=variant.max_area, multiple=variant.image_size_multiple)
    return variant.resolutions[0]


@torch.no_grad()
def generate(models: Models, request: Request, on_step: OnStep | None = None) -> Result:
    """Make frames from a prompt.

    Args:
        models: From `load`.
        request: What to make.
        on_step: Called after each sampling step with (step, steps, latents); raise in it to cancel.

    Raises:
        ValueError: the request does not fit the variant, before any work.
    """
    if not models.variant_named:
        models = replace(models, variant=fitting_variant(request, models.variant))
    request = resolve(request, models.variant)
    clock = _Clock()
    with clock.stage("text"), models.on_device(models.text_encoder):
        positive, negative = encode_prompts(models, request)
    shape = VideoShape(request.batch, request.num_frames, request.height, request.width)
    latent_shape = shape.latent_shape(models.variant.vae)
    image = None
    if request.image is not None:
        condition = first_frame_conditioning if request.task == "i2v" else source_conditioning
        with clock.stage("vae_encode"), models.on_device(models.vae):
            image = condition(models, request, latent_shape)
    with clock.stage("dit"), models.on_device(models.dit):
        latents = sample_latents(models, request, latent_shape, positive, negative, image, on_step)
    with clock.stage("vae_decode"), models.on_device(models.vae):
        frames = decode_frames(models, latents, request.vae_budget_bytes)
    return Result(frames=frames, settings=settings(request, models.variant), seconds=clock.seconds)


def encode_prompts(models: Models, request: Request) -> tuple[TextConditioning, TextConditioning | None]:
    """Positive and, where guidance is on, negative text for every row of the batch."""
    prompts = [request.prompt]
    if abs(request.guidance_scale - 1) > GUIDANCE_OFF:
        prompts.append(request.negative_prompt)
    images = None
    if request.task == "i2i" and request.image is not None:
        images = [fit_image(request.image, request.height, request.width)]
    rows = [
        models.text_encoder.encode(
            [prompt], task=request.task, max_tokens=models.variant.max_text_tokens, images=images
        )
        .to(models.device)
        .repeat(request.batch)
        for prompt in prompts
    ]
    rows = [replace(row, embeds=row.embeds.to(models.dtype), pooled=row.pooled.to(models.dtype)) for row in rows]
    return rows[0], rows[1] if len(rows) > 1 else None


def first_frame_conditioning(models: Models, request: Request, latent_shape: LatentShape) -> ImageConditioning:
    """The given image as the clean first latent frame, with its mask."""
    first = encode_image(models, request)
    clean = torch.zeros(latent_shape, device=models.device)
    clean[:, :, :1] = first
    mask = torch.zeros(latent_shape.batch, 1, latent_shape.frames, 1, 1, device=models.device)
    mask[:, :, 0] = 1
    return ImageConditioning(clean=clean, mask=mask)


def source_conditioning(models: Models, request: Request, latent_shape: LatentShape) -> ImageConditioning:
    """The picture to edit in the source channels, with a mask of ones; the same for both passes of guidance."""
    source = encode_image(models, request).expand(latent_shape)
    return ImageConditioning(source=source, mask=torch.ones(latent_shape.batch, 1, 1, 1, 1, device=models.device))


def encode_image(models: Models, request: Request) -> Tensor:
    """The request's image, covered and cropped to its size, as scaled latents (1, C, 1, h, w) fp32."""
    pixels = fit_image(request.image, request.height, request.width)
    dtype = _dtype_of(models.vae)
    pixels = (pixels * 2 - 1).permute(2, 0, 1)[None, :, None].to(models.device, dtype)
    plan = plan_encode(
        tuple(pixels.shape),
        models.variant.vae,
        budget_bytes=request.vae_budget_bytes,
        bytes_per_element=dtype.itemsize,
    )
    return scale_latents(encode_tiled(models.vae, pixels, plan), models.variant.vae).float()


def fit_image(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) in [0, 1] scaled to cover (height, width), anti-aliased, and cropped to its centre."""
    scale = max(height / image.shape[0], width / image.shape[1])
    covered = (max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    channels_first = image.permute(2, 0, 1)[None].float()
    if tuple(channels_first.shape[2:]) != covered:
        channels_first = nn.functional.interpolate(channels_first, size=covered, mode="bilinear", antialias=True)
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return channels_first[0, :, top : top + height, left : left + width].permute(1, 2, 0).clamp(0, 1)


def sample_latents(
    models: Models, request: Request, latent_shape: LatentShape, positive: TextConditioning,
    negative: TextConditioning | None, image: ImageConditioning | None = None, on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """Scaled latents (B, C, T, h, w) fp32 from noise."""
    variant = models.variant
    nabla = resolve_attention(request.attention, variant.nabla)
    grid = latent_shape.token_grid(variant.dit.patch_size)
    plan = plan_visual(variant.dit, grid, variant.rope_scale, nabla, models.device)
    velocity_fn = guided_velocity(models.dit, positive, negative, request.guidance_scale, plan, image)
    noise = initial_noise(latent_shape, request.seed).to(models.device)
    sigmas = flow_schedule(request.num_steps, request.shift).to(models.device)
    latents = SAMPLERS[request.sampler](velocity_fn, noise, sigmas, on_step)
    return latents if image is None or image.clean is None else normalise_first_frames(hold(latents, image))


def decode_frames(models: Models, latents: Tensor, budget_bytes: int) -> Tensor:
    """Scaled latents (B, C, T, h, w) to frames (B, F, H, W, 3) fp32 in [0, 1] on the CPU."""
    dtype = _dtype_of(models.vae)
    plan = plan_decode(
        tuple(latents.shape), models.variant.vae, budget_bytes=budget_bytes, bytes_per_element=dtype.itemsize
    )
    pixels = decode_tiled(models.vae, unscale_latents(latents, models.variant.vae).to(dtype), plan)
    return ((pixels.float().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()


def settings(request: Request, variant: Variant) -> dict[str, object]:
    """What a resolved request came to, as plain JSON values."""
    values = {
        name: value for name, value in dataclasses.asdict(replace(request, image=None)).items() if name != "image"
    }
    nabla = resolve_attention(request.attention, variant.nabla)
    used = {"attention": "dense" if nabla is None else f"nabla mass={nabla.mass} window={list(nabla.window)}"}
    return {"variant": variant.name, **values, **used, "rope_scale": list(variant.rope_scale), "fps": variant.fps}


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)
