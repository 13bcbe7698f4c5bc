"""Masks: (F or 1, H, W) fp32 in [0, 1]; 0 stays, 1 is made anew."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VAEConfig

log = logging.getLogger(__name__)


def check_mask(mask: Tensor, size: tuple[int, int], num_frames: int) -> Tensor:
    """The mask as (F or 1, H, W) fp32.

    Args:
        mask: (H, W) or (F, H, W).
        size: (height, width) of what it belongs to.

    Raises:
        ValueError: another shape, size or number of frames, values outside [0, 1], or nothing to repaint.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; give (height, width) or (frames, height, width)")
    mask = (mask if mask.ndim == 3 else mask[None]).to(torch.float32)
    if tuple(mask.shape[1:]) != tuple(size):
        given = "x".join(str(side) for side in reversed(mask.shape[-2:]))
        raise ValueError(f"the mask is {given} and the picture {size[1]}x{size[0]}; make them the same size")
    if len(mask) not in (1, num_frames):
        raise ValueError(f"the mask has {len(mask)} frames; give one for all, or {num_frames}, one for each")
    if not torch.isfinite(mask).all():
        raise ValueError("the mask has values that are not finite (NaN or infinity); give values from 0 to 1")
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"the mask has values from {mask.min():g} to {mask.max():g}, outside 0 to 1; divide bytes by 255"
        )
    if mask.max() == 0:
        raise ValueError("the mask is empty (all black), so there is nothing to repaint; paint the part white")
    if mask.min() == 1:
        log.info("the mask is full: everything is made anew")
    return mask


def grow(mask: Tensor, pixels: int) -> Tensor:
    """The mask spread by a round brush of that radius; negative pixels shrink it. Nothing comes in from outside.

    Equal to kornia's `dilation` and `erosion` with a disk, whose time and memory grow with the disk's area: minutes
    and gigabytes at 1024x1024. Here time grows with the radius, and memory with its logarithm.
    """
    sign = 1 if pixels > 0 else -1  # shrinking what is masked is growing what is not
    return torch.stack([sign * _dilated(sign * frame, abs(pixels)) for frame in mask])


def _dilated(frame: Tensor, radius: int) -> Tensor:
    """The maximum over a disk around every pixel of (H, W), as the maximum over the disk's rows."""
    height, width = frame.shape
    reach = min(radius, width - 1)
    runs = _runs(F.pad(frame, (reach, reach), value=-math.inf), 2 * reach + 1)
    grown = frame.clone()
    for dy in range(min(radius, height - 1) + 1):
        half = min(math.isqrt(radius**2 - dy**2), reach)
        # Two runs, which may overlap, make the disk's row: one from its first pixel on, one up to its last.
        power = (2 * half + 1).bit_length() - 1
        first, last = reach - half, reach + half + 1 - 2**power
        row = torch.maximum(runs[power][:, first : first + width], runs[power][:, last : last + width])
        grown[dy:] = torch.maximum(grown[dy:], row[: height - dy])
        grown[: height - dy] = torch.maximum(grown[: height - dy], row[dy:])
    return grown


def _runs(frame: Tensor, longest: int) -> list[Tensor]:
    """For k = 0, 1, ...: the maximum of the 2^k pixels that start at each one, while 2^k <= `longest`."""
    runs = [frame]
    while 2 ** len(runs) <= longest:
        step = 2 ** (len(runs) - 1)
        runs.append(torch.maximum(runs[-1][:, :-step], runs[-1][:, step:]))
    return runs


def feather(mask: Tensor, pixels: int) -> Tensor:
    """The mask blurred over `pixels` to each side of its edge: unchanged further away, along rows or columns."""
    from kornia.filters import gaussian_blur2d

    if pixels < 1:
        return mask
    size = 2 * pixels + 1
    blurred = gaussian_blur2d(mask[:, None], (size, size), (pixels / 2, pixels / 2), border_type="replicate")[:, 0]
    # The blur's weights add up to 1 only nearly; far from an edge the mask must be itself.
    varies = _square_maximum(mask, pixels) > -_square_maximum(-mask, pixels)
    return torch.where(varies, blurred.clamp(0, 1), mask)


def _square_maximum(mask: Tensor, pixels: int) -> Tensor:
    """Over a square around every pixel; along rows and then columns, for time to grow with its side and not area."""
    size = 2 * pixels + 1
    return F.max_pool2d(F.max_pool2d(mask[:, None], (1, size), 1, (0, pixels)), (size, 1), 1, (pixels, 0))[:, 0]


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
        top + (overlap if top else 0) : max(0, top + height - (overlap if bottom else 0)),
        left + (overlap if left else 0) : max(0, left + width - (overlap if right else 0)),
    ] = 1
    return torch.where(inner > 0, new, torch.ones_like(new))


def repainted(
    mask: Tensor | None, size: tuple[int, int], *, outpaint: tuple[int, int, int, int], overlap: int, grow_by: int = 0,
    feather_by: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What may change of a picture with new pixels around it, and how much of the result goes into it.

    Args:
        mask: (F or 1, H, W) of the old picture; None where only the new pixels are painted.
        overlap: Pixels of the old picture that are made again beside a new edge.

    Returns:
        The mask, and the alpha that the result is pasted with, both (F or 1, H', W'). Without feathering the alpha is
        0 or 1, but for a picture that is only painted around: there it falls to 0 over the overlap, to hide the seam.
    """
    grown = grow(mask, grow_by) if mask is not None and grow_by else mask
    changes = outpaint_mask(grown, size, outpaint, overlap) if any(outpaint) or grown is None else grown
    alpha = (changes > 0).float()
    if feather_by:
        alpha = feather(alpha, feather_by)
    elif mask is None:
        half = max(1, overlap // 2)
        alpha = feather(outpaint_mask(None, size, outpaint, half), half)
    return changes, alpha


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
