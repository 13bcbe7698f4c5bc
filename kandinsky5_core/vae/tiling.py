"""Encode and decode in overlapping tiles, blended linearly (plans: `tile_plan.py`).

Shapes: latents (B, C, T, h, w), unscaled; pixels (B, 3, F, H, W) in [-1, 1].
Every axis is cut on its own into pieces, and a tile is one piece of each. A piece reads a range of latent cells and
writes a range of output cells with weights; on each axis the weights of all pieces add up to one at every output
cell, so those of the tiles, their products, do too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import VAEConfig
from ..shapes import LatentShape, VideoShape
from .latents import sample_posterior
from .tile_plan import (
    DEFAULT_BUDGET_BYTES,
    TilePlan,
    activation_bytes,
    is_causal,
    latents_of_pixels,
    piece_starts,
    plan_decode,
    plan_encode,
)

__all__ = [
    "DEFAULT_BUDGET_BYTES",
    "VAE",
    "OnTile",
    "Piece",
    "TilePlan",
    "activation_bytes",
    "axis_pieces",
    "decode_tiled",
    "encode_tiled",
    "plan_decode",
    "plan_encode",
]

OnTile = Callable[[int, int], None]
"""Called as on_tile(done, total) after every tile; what it raises ends the work."""


class VAE(Protocol):
    """What tiling needs of an autoencoder."""

    config: VAEConfig

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """One range of one axis."""

    start: int
    """First latent cell read."""
    stop: int
    """One past the last latent cell read."""
    write: slice
    """Output cells it gives; on the time axis less than it computes, for its context is dropped."""
    weights: Tensor
    """(length of `write`,) fp32."""


def axis_pieces(
    size: int, tile: int, overlap: int, *, context: int = 0, edge: Callable[[int], int] = lambda cell: cell
) -> list[Piece]:
    """Cut an axis of `size` latent cells into pieces of `tile` that share `overlap`.

    Args:
        context: cells at the head of every piece but the first that are computed and dropped.
        edge: the output position of the boundary before a latent cell.

    Raises:
        ValueError: `context` cells would be written by no piece, because `overlap` is smaller.
    """
    starts = piece_starts(size, tile, overlap)
    if len(starts) > 1 and overlap < context:
        raise ValueError(f"overlap_frames {overlap} is too small: pieces of a causal VAE share at least {context}")
    stops = [min(start + tile, size) for start in starts]
    ranges = [(edge(a + context if a else 0), edge(b)) for a, b in zip(starts, stops, strict=True)]
    return [
        Piece(start, stop, slice(*span), weights)
        for start, stop, span, weights in zip(starts, stops, ranges, _crossfade(ranges), strict=True)
    ]


def _crossfade(ranges: list[tuple[int, int]]) -> list[Tensor]:
    """Weights of ranges laid down in order, each fading in over all that lies there already; they add up to one."""
    weights: list[Tensor] = []
    for begin, end in ranges:
        fade_in = torch.ones(end - begin, dtype=torch.float64)
        covered = ranges[len(weights) - 1][1] - begin if weights else 0
        fade_in[:covered] = (torch.arange(covered, dtype=torch.float64) + 0.5) / max(covered, 1)
        for (earlier, stop), under in zip(ranges, weights, strict=False):
            shared = max(0, stop - begin)
            under[begin - earlier :][:shared] *= 1 - fade_in[:shared]
        weights.append(fade_in)
    return [weight.float() for weight in weights]


@torch.no_grad()
def decode_tiled(
    vae: VAE,
    latents: Tensor,
    plan: TilePlan,
    on_tile: OnTile | None = None,
    *,
    output_device: torch.device | str | None = None,
) -> Tensor:
    """Pixels (B, 3, F, H, W), fp32, about [-1, 1] and not clamped, of unscaled latents (B, C, T, h, w).

    Exactly `vae.decode` where one tile covers all. Beside one tile's work, memory holds the result only, on
    `output_device` (default: where the latents are). No gradients.
    """
    config, shape = vae.config, LatentShape(*latents.shape)
    device = torch.device(output_device or latents.device)
    if plan.num_tiles(shape) == 1:
        return _one_tile(vae.decode(latents), device, on_tile)
    axes = tile_axes(shape, plan, config, to_pixels=True)
    out = torch.zeros(_pixel_shape(shape, config), device=device)

    def decode(batch: slice, t: Piece, h: Piece, w: Piece) -> Tensor:
        return vae.decode(latents[batch, :, t.start : t.stop, h.start : h.stop, w.start : w.stop])

    return _accumulate(out, shape.batch, plan.batch, axes, decode, on_tile)


@torch.no_grad()
def encode_tiled(
    vae: VAE,
    pixels: Tensor,
    plan: TilePlan,
    on_tile: OnTile | None = None,
    *,
    generator: torch.Generator | None = None,
    output_device: torch.device | str | None = None,
) -> Tensor:
    """Unscaled latents (B, C, T, h, w), fp32, of pixels (B, 3, F, H, W) in [-1, 1].

    The posterior mean, or with a generator one sample, drawn after blending so that overlaps keep their variance.
    Exactly `vae.encode` where one tile covers all. Blended in latent cells. No gradients.

    Raises:
        ValueError: a size that the VAE cannot take.
    """
    config, shape = vae.config, latents_of_pixels(pixels.shape, vae.config)
    device = torch.device(output_device or pixels.device)
    if plan.num_tiles(shape) == 1:
        return _one_tile(vae.encode(pixels, generator), device, on_tile)
    axes = tile_axes(shape, plan, config, to_pixels=False)
    moments = torch.zeros(shape._replace(channels=2 * config.latent_channels), device=device)
    space, time = config.spatial_ratio, config.temporal_ratio

    def encode(batch: slice, t: Piece, h: Piece, w: Piece) -> Tensor:
        # A piece begins with the last pixel frame of its context cell, which becomes the causal first frame.
        frames = slice(time * t.start, time * (t.stop - 1) + 1)
        rows, columns = slice(space * h.start, space * h.stop), slice(space * w.start, space * w.stop)
        return torch.cat(vae.moments(pixels[batch, :, frames, rows, columns]), dim=1)

    mean, logvar = _accumulate(moments, shape.batch, plan.batch, axes, encode, on_tile).chunk(2, dim=1)
    return mean if generator is None else sample_posterior(mean, logvar, generator)


def _accumulate(
    out: Tensor,
    batch_size: int,
    batch_step: int,
    axes: tuple[list[Piece], list[Piece], list[Piece]],
    compute: Callable[[slice, Piece, Piece, Piece], Tensor],
    on_tile: OnTile | None,
) -> Tensor:
    """Add every tile into `out`, weighted."""
    batches = [slice(start, start + batch_step) for start in range(0, batch_size, batch_step)]
    total = len(batches) * math.prod(len(pieces) for pieces in axes)
    for done, (batch, t, h, w) in enumerate(itertools.product(batches, *axes), start=1):
        # fp32: in 16 bits the weights of up to eight tiles would no longer add up.
        tile = compute(batch, t, h, w)[:, :, -len(t.weights) :].float()
        for piece, view in ((t, (-1, 1, 1)), (h, (-1, 1)), (w, (-1,))):
            tile = tile.mul_(piece.weights.to(tile.device).view(view))
        out[batch, :, t.write, h.write, w.write] += tile.to(out.device)
        if on_tile is not None:
            on_tile(done, total)
    return out


def tile_axes(
    shape: LatentShape, plan: TilePlan, config: VAEConfig, *, to_pixels: bool
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """The pieces of each axis of a plan, (frames, height, width)."""

    def frame_edge(frame: int) -> int:
        return config.temporal_ratio * (frame - 1) + 1 if to_pixels and frame else frame

    def cell_edge(cell: int) -> int:
        return config.spatial_ratio * cell if to_pixels else cell

    context = 1 if is_causal(config) else 0
    return (
        axis_pieces(shape.frames, plan.frames, plan.overlap_frames, context=context, edge=frame_edge),
        axis_pieces(shape.height, plan.height, plan.overlap_height, edge=cell_edge),
        axis_pieces(shape.width, plan.width, plan.overlap_width, edge=cell_edge),
    )


def _one_tile(result: Tensor, device: torch.device, on_tile: OnTile | None) -> Tensor:
    if on_tile is not None:
        on_tile(1, 1)
    return result.to(device=device, dtype=torch.float32)


def _pixel_shape(shape: LatentShape, config: VAEConfig) -> tuple[int, ...]:
    clip = VideoShape.from_latent(shape, config)
    return clip.batch, 3, clip.frames, clip.height, clip.width
