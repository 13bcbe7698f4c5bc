"""Masks: (F or 1, H, W) fp32 in [0, 1]; 0 stays, 1 is made anew."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VAEConfig

log = logging.getLogger(__name__)

_GROW_STEP = 15
"""Radius of one dilation: kornia's cost grows with the area of its kernel."""


def check_mask(mask: Tensor, size: tuple[int, int], num_frames: int) -> Tensor:
    """The mask as (F or 1, H, W) fp32.

    Args:
        mask: (H, W) or (F, H, W).
        size: (height, width) of what it belongs to.

    Raises:
        ValueError: another size or number of frames, values outside [0, 1], or nothing to repaint.
    """
    mask = (mask if mask.ndim == 3 else mask[None]).to(torch.float32)
    if mask.ndim != 3 or tuple(mask.shape[1:]) != tuple(size):
        given = "x".join(str(side) for side in reversed(mask.shape[-2:]))
        raise ValueError(f"the mask is {given} and the picture {size[1]}x{size[0]}; make them the same size")
    if len(mask) not in (1, num_frames):
        raise ValueError(f"the mask has {len(mask)} frames; give one for all, or {num_frames}, one for each")
    if not (torch.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
        raise ValueError("the mask has values outside 0 to 1; divide by its maximum first")
    if mask.max() == 0:
        raise ValueError("the mask is empty (all black), so there is nothing to repaint; paint the part white")
    if mask.min() == 1:
        log.info("the mask is full: everything is made anew")
    return mask


def grow(mask: Tensor, pixels: int) -> Tensor:
    """The mask spread by a round brush of that radius; negative pixels shrink it."""
    from kornia.morphology import dilation, erosion

    change = dilation if pixels > 0 else erosion
    left = abs(pixels)
    while left > 0:  # round brushes add up: radius a, then b, is radius a + b
        step = min(left, _GROW_STEP)
        mask = torch.cat([change(frame[None, None], _disk(step), engine="convolution")[0] for frame in mask])
        left -= step
    return mask


def _disk(radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets[None] ** 2 <= radius**2).float()


def feather(mask: Tensor, pixels: int) -> Tensor:
    """The mask blurred over `pixels` to each side of its edge: unchanged further away than that."""
    from kornia.filters import gaussian_blur2d

    if pixels < 1:
        return mask
    size = 2 * pixels + 1
    blurred = gaussian_blur2d(mask[:, None], (size, size), (pixels / 2, pixels / 2), border_type="replicate")[:, 0]
    # The blur's weights add up to 1 only nearly; far from an edge the mask must be itself.
    spread = F.max_pool2d(mask[:, None], size, 1, pixels)[:, 0] - (-F.max_pool2d(-mask[:, None], size, 1, pixels))[:, 0]
    return torch.where(spread > 0, blurred.clamp(0, 1), mask)


def outpaint_mask(
    mask: Tensor | None, size: tuple[int, int], outpaint: tuple[int, int, int, int], overlap: int
) -> Tensor:
    """(F or 1, H', W') of a picture with new pixels around it: they, and `overlap` pixels beside them, are made anew.

    Args:
        mask: What else is made anew on the old picture.
        size: (height, width) of the old picture.
        outpaint: Pixels added left, top, right and bottom.
    """
    left, top, right, bottom = outpaint
    height, width = size
    old = torch.zeros(1, height, width) if mask is None else mask
    new = F.pad(old, (left, right, top, bottom), value=1.0)
    inner = torch.zeros_like(new)
    inner[
        :,
        top + (overlap if top else 0) : top + height - (overlap if bottom else 0),
        left + (overlap if left else 0) : left + width - (overlap if right else 0),
    ] = 1
    return torch.where(inner > 0, new, torch.ones_like(new))


def latent_mask(mask: Tensor, vae: VAEConfig, num_frames: int) -> Tensor:
    """(1, 1, T, h, w): the largest value among the pixels and frames of each latent cell.

    Args:
        mask: Height and width are multiples of the VAE's ratio.
        num_frames: Pixel frames of the clip, 4k+1.
    """
    ratio, group = vae.spatial_ratio, vae.temporal_ratio
    cells = F.max_pool2d(mask[:, None], ratio)[:, 0].expand(num_frames, -1, -1)
    count = math.ceil((num_frames - 1) / group)
    later = cells[1:].unflatten(0, (count, group)).amax(1) if count else cells[1:]
    return torch.cat([cells[:1], later])[None, None]


def composite(generated: Tensor, base: Tensor, alpha: Tensor) -> Tensor:
    """`generated` (B, F, H, W, 3) over `base` (F, H, W, 3); where alpha is 0 the base stays bit by bit."""
    weight = alpha[None, ..., None].to(generated)
    base = base[None].to(generated)
    return torch.where(weight == 0, base, torch.where(weight == 1, generated, base + weight * (generated - base)))
