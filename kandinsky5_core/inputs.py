"""Given pictures and clips on their way into latent space.

What the DiT is shown is an `ImageConditioning` (given frames, or a picture to edit); what sampling starts from, and
may not change, is a `PartialNoise`; what goes back into the result pixel by pixel is a `Paste`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import Canvas, cover, extend_edges
from .conditioning import ImageConditioning
from .config import Variant
from .masks import composite, latent_mask, repainted
from .request import NO_OUTPAINT, OUTPAINT_OVERLAP, Request
from .sampling.partial import PartialNoise
from .shapes import LatentShape
from .vae.latents import scale_latents
from .vae.within import encode_within

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


def encode_inputs(
    models: Models, request: Request, latent_shape: LatentShape, told: dict[str, object] | None = None
) -> Inputs:
    """Everything that a resolved request gives, in latent space; an empty `Inputs` for text alone.

    The way that the VAE took, for several encodings the last one's, goes into `told`.
    """
    if request.task == "i2v":
        return Inputs(image=frame_conditioning(models, request, latent_shape, told))
    start = request.video if request.task == "t2v" else None if request.image is None else request.image[None]
    if start is None:
        return Inputs()
    canvas = request.canvas()
    extended = extend_edges(start.float(), request.outpaint)
    clean = encode_frames(models, canvas.to_work(extended), request.vae_budget_bytes, told).expand(latent_shape)
    image = _source(clean) if request.task == "i2i" else None
    if not request.is_partial:
        return Inputs(image=image, canvas=canvas if request.fit == "keep" else None)
    kept = canvas if request.fit == "keep" else None
    if request.mask is None and request.outpaint == NO_OUTPAINT:
        return Inputs(image=image, partial=PartialNoise(clean=clean), canvas=kept)
    mask, alpha = repainted(
        request.mask, tuple(request.given.shape[1:3]), outpaint=request.outpaint,
        overlap=outpaint_overlap(models.variant), grow_by=request.mask_grow, feather_by=request.mask_feather,
    )  # fmt: skip
    strength = latent_mask(_to_work(canvas, mask), models.variant.vae, request.num_frames).to(clean.device)
    paste = Paste(base=extended, alpha=alpha)
    if kept is None:
        paste = Paste(base=canvas.to_work(extended), alpha=_to_work(canvas, alpha))
    return Inputs(image=image, partial=PartialNoise(clean=clean, strength=strength), canvas=kept, paste=paste)


def _source(clean: Tensor) -> ImageConditioning:
    """The picture to edit in the source channels, with a mask of ones; the same for both passes of guidance."""
    return ImageConditioning(source=clean, mask=torch.ones(len(clean), 1, 1, 1, 1, device=clean.device))


def outpaint_overlap(variant: Variant) -> int:
    """Pixels of the old picture that are made again beside a new edge; fewer for small models, whose pixels are
    larger parts of what they see."""
    side = min(min(size) for size in variant.resolutions)
    return max(variant.vae.spatial_ratio, min(OUTPAINT_OVERLAP, side // 8))


def _to_work(canvas: Canvas, mask: Tensor) -> Tensor:
    """A mask (F or 1, H, W) on the model's frame."""
    return canvas.to_work(mask[..., None])[..., 0].clamp(0, 1)


def frame_conditioning(
    models: Models, request: Request, latent_shape: LatentShape, told: dict[str, object] | None = None
) -> ImageConditioning:
    """Given frames as clean latents at their places, with their mask (image to video).

    The first frame has a latent of its own. Later ones share theirs with three neighbours, so a picture is
    encoded there as four frames that stand still.
    """
    group = models.variant.vae.temporal_ratio


    def encode(frames: Tensor) -> Tensor:
        return encode_frames(models, _fitted(request, frames), request.vae_budget_bytes, told)

    if request.extend is not None:
        latents = encode(request.extend[-request.overlap :])
        return held_latents(dict(enumerate(latents.unbind(2))), latent_shape)
    pictures = dict(request.keyframes) if request.image is None else {0: request.image, **request.keyframes}
    return held_latents(encode_keyframes(pictures, group, encode), latent_shape)


def encode_keyframes(
    pictures: Mapping[int, Tensor], group: int, encode: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """Pictures (H, W, 3) by frame as latents (1, C, h, w) by latent frame.

    Args:
        group: Frames that share a latent frame.
        encode: Frames (F, H, W, 3) to latents (1, C, T, h, w).
    """
    latents = {}
    for frame, picture in pictures.items():
        index = (frame + group - 1) // group
        still = picture[None].expand(1 if index == 0 else group + 1, -1, -1, -1)
        latents[index] = encode(still)[:, :, -1]
    return latents


def held_latents(given: Mapping[int, Tensor], shape: LatentShape) -> ImageConditioning:
    """Latents by latent frame as what image to video holds: clean (B, C, T, h, w), and 1 in the mask where given."""
    device = next(iter(given.values())).device
    clean = torch.zeros(shape, device=device)
    mask = torch.zeros(shape.batch, 1, shape.frames, 1, 1, device=device)
    for index, latent in given.items():
        clean[:, :, index] = latent
        mask[:, :, index] = 1
    return ImageConditioning(clean=clean, mask=mask)


def _fitted(request: Request, frames: Tensor) -> Tensor:
    size = (request.height, request.width)
    return cover(tuple(frames.shape[1:3]), size).to_work(frames.float())


def encode_frames(
    models: Models, frames: Tensor, budget_bytes: int, told: dict[str, object] | None = None
) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1] as scaled latents (1, C, T, h, w) fp32.

    The way that the VAE took goes into `told`.
    """
    dtype = next(models.vae.parameters()).dtype
    pixels = (frames * 2 - 1).permute(3, 0, 1, 2)[None].to(models.device, dtype)
    return scale_latents(encode_within(models.vae, pixels, budget_bytes, told=told), models.variant.vae).float()
