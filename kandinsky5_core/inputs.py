"""Given pictures and clips on their way into latent space.

What the DiT is shown is an `ImageConditioning` (given frames, or a picture to edit); what sampling starts from, and
may not change, is a `PartialNoise`; what goes back into the result pixel by pixel is a `Paste`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import Canvas, cover, extend_edges
from .conditioning import ImageConditioning
from .config import Variant
from .masks import composite, feather, grow, latent_mask, outpaint_mask
from .request import NO_OUTPAINT, OUTPAINT_OVERLAP, Request
from .sampling.partial import PartialNoise
from .shapes import LatentShape
from .vae.latents import scale_latents
from .vae.tiling import encode_tiled, plan_encode

if TYPE_CHECKING:
    from .pipeline import Models


@dataclass(frozen=True, kw_only=True)
class Paste:
    """Original pixels to put back into the result."""

    base: Tensor
    """(F, H, W, 3) in [0, 1]."""
    alpha: Tensor
    """(F or 1, H, W): 0 keeps the original bit by bit, 1 takes what was made."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a run is given beside text."""

    image: ImageConditioning | None = None
    partial: PartialNoise | None = None
    canvas: Canvas | None = None
    """Where the result is cut out of the model's frame; None: it is the whole frame."""
    paste: Paste | None = None

    def finish(self, frames: Tensor) -> Tensor:
        """Decoded (B, F, h, w, 3) as the result: at the given picture's size, with its kept pixels."""
        if self.canvas is not None:
            frames = torch.stack([self.canvas.from_work(row) for row in frames])
        if self.paste is not None:
            frames = composite(frames, self.paste.base, self.paste.alpha)
        return frames


def encode_inputs(models: Models, request: Request, latent_shape: LatentShape) -> Inputs:
    """Everything that a resolved request gives, in latent space; an empty `Inputs` for text alone."""
    if request.task == "i2v":
        return Inputs(image=frame_conditioning(models, request, latent_shape))
    start = request.video if request.task == "t2v" else None if request.image is None else request.image[None]
    if start is None:
        return Inputs()
    canvas = request.canvas()
    extended = extend_edges(start.float(), request.outpaint)
    clean = encode_frames(models, canvas.to_work(extended), request.vae_budget_bytes).expand(latent_shape)
    image = _source(clean) if request.task == "i2i" else None
    if not request.is_partial:
        return Inputs(image=image, canvas=canvas if request.fit == "keep" else None)
    mask = _mask(models, request)
    strength = None if mask is None else latent_mask(_to_work(canvas, mask), models.variant.vae, request.num_frames)
    return Inputs(
        image=image,
        partial=PartialNoise(clean=clean, strength=None if strength is None else strength.to(clean.device)),
        canvas=canvas if request.fit == "keep" else None,
        paste=None if mask is None else _paste(request, canvas, extended, mask, outpaint_overlap(models.variant)),
    )


def _source(clean: Tensor) -> ImageConditioning:
    """The picture to edit in the source channels, with a mask of ones; the same for both passes of guidance."""
    return ImageConditioning(source=clean, mask=torch.ones(len(clean), 1, 1, 1, 1, device=clean.device))


def _mask(models: Models, request: Request) -> Tensor | None:
    """The grown mask on the extended picture, (F or 1, H, W)."""
    mask = request.mask
    if mask is not None and request.mask_grow:
        mask = grow(mask, request.mask_grow)
    if request.outpaint == NO_OUTPAINT:
        return mask
    size = tuple(request.given.shape[1:3])
    return outpaint_mask(mask, size, request.outpaint, outpaint_overlap(models.variant))


def strip_alpha(size: tuple[int, int], outpaint: tuple[int, int, int, int], overlap: int) -> Tensor:
    """(1, H', W') of a picture painted around: 1 on new pixels, falling to 0 over the strip that is made again."""
    half = max(1, overlap // 2)
    return feather(outpaint_mask(None, size, outpaint, half), half)


def outpaint_overlap(variant: Variant) -> int:
    """Pixels of the old picture that are made again beside a new edge; fewer for small models, whose pixels are
    larger parts of what they see."""
    side = min(min(size) for size in variant.resolutions)
    return max(variant.vae.spatial_ratio, min(OUTPAINT_OVERLAP, side // 8))


def _paste(request: Request, canvas: Canvas, extended: Tensor, mask: Tensor, overlap: int) -> Paste:
    alpha = (mask > 0).float()
    if request.mask_feather:
        alpha = feather(alpha, request.mask_feather)
    elif request.mask is None:
        alpha = strip_alpha(tuple(request.given.shape[1:3]), request.outpaint, overlap)
    if request.fit == "keep":
        return Paste(base=extended, alpha=alpha)
    return Paste(base=canvas.to_work(extended), alpha=_to_work(canvas, alpha))


def _to_work(canvas: Canvas, mask: Tensor) -> Tensor:
    """A mask (F or 1, H, W) on the model's frame."""
    return canvas.to_work(mask[..., None])[..., 0].clamp(0, 1)


def frame_conditioning(models: Models, request: Request, latent_shape: LatentShape) -> ImageConditioning:
    """Given frames as clean latents at their places, with their mask (image to video).

    The first frame has a latent of its own. Later ones share theirs with three neighbours, so a picture is
    encoded there as four frames that stand still.
    """
    group = models.variant.vae.temporal_ratio
    given: dict[int, Tensor] = {}
    if request.extend is not None:
        frames = _fitted(request, request.extend[-request.overlap :])
        latents = encode_frames(models, frames, request.vae_budget_bytes)
        given = {index: latents[:, :, index] for index in range(latents.shape[2])}
    pictures = dict(request.keyframes) if request.image is None else {0: request.image, **request.keyframes}
    for frame, picture in pictures.items():
        index = (frame + group - 1) // group
        still = _fitted(request, picture[None]).expand(1 if index == 0 else group + 1, -1, -1, -1)
        given[index] = encode_frames(models, still, request.vae_budget_bytes)[:, :, -1]
    clean = torch.zeros(latent_shape, device=models.device)
    mask = torch.zeros(latent_shape.batch, 1, latent_shape.frames, 1, 1, device=models.device)
    for index, latent in given.items():
        clean[:, :, index] = latent
        mask[:, :, index] = 1
    return ImageConditioning(clean=clean, mask=mask)


def _fitted(request: Request, frames: Tensor) -> Tensor:
    size = (request.height, request.width)
    return cover(tuple(frames.shape[1:3]), size).to_work(frames.float())


def encode_frames(models: Models, frames: Tensor, budget_bytes: int) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1] as scaled latents (1, C, T, h, w) fp32."""
    dtype = next(models.vae.parameters()).dtype
    pixels = (frames * 2 - 1).permute(3, 0, 1, 2)[None].to(models.device, dtype)
    plan = plan_encode(
        tuple(pixels.shape), models.variant.vae, budget_bytes=budget_bytes, bytes_per_element=dtype.itemsize
    )
    return scale_latents(encode_tiled(models.vae, pixels, plan), models.variant.vae).float()
