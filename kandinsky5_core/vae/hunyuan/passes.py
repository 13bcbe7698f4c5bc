"""A clip through the HunyuanVideo VAE by a `StreamPlan`: coarse levels layer by layer, fine ones streamed.

Shapes: latents (B, C, T, h, w), unscaled; pixels (B, 3, F, H, W) in [-1, 1]. Clips of a batch go one after the other.
Time and space both count from the latents: cell i of the latents is `scale` positions of a coarser or finer level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...shapes import LatentShape, VideoShape
from ..latents import sample_posterior
from ..stream_plan import StreamPlan, Tile
from ..tile_plan import latents_of_pixels
from .layered import layered
from .layers import Upsample
from .model import HunyuanVAE
from .norms import Known
from .streamed import streamed
from .units import Head, decoder_cut, decoder_units, encoder_cut, encoder_units

OnTile = Callable[[int, int], None]
Units = Sequence[nn.Module | Head]


@torch.no_grad()
def decode_streamed(
    vae: HunyuanVAE, latents: Tensor, plan: StreamPlan, on_tile: OnTile | None = None,
    *, output_device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """Pixels (B, 3, F, H, W), fp32, about [-1, 1] and not clamped, of unscaled latents (B, C, T, h, w).

    Up to rounding `vae.decode` where the plan has all levels exact. `on_tile` is called as on_tile(done, total) after
    each step; what it raises ends the work. No gradients.
    """
    shape = LatentShape(*latents.shape)
    clip = VideoShape.from_latent(shape, vae.config)
    device = torch.device(output_device or latents.device)
    out = torch.empty(clip.batch, 3, *clip[1:], device=device)
    units = decoder_units(vae)
    cut = decoder_cut(units, plan.exact_levels)
    exact, fine = units[:cut], units[cut:]
    piece = max(1, plan.frames // vae.config.temporal_ratio)
    steps = _Steps(on_tile, shape.batch * _count(units, fine, plan, shape, math.ceil(shape.frames / piece)))
    for index in range(shape.batch):
        known: Known = {}
        pieces = _split(latents[index : index + 1], piece)
        pieces = layered(exact, pieces, known, steps)
        if not fine:
            _write(out[index : index + 1], pieces)
            continue
        layered(fine, _windows(pieces, plan, shape), known, steps, separate=True)
        limits, space = _limits(fine, plan.frames), vae.config.spatial_ratio
        for tile in plan.tiles(shape):
            made = streamed(fine, _read(pieces, tile, shape, steps), known, limits)
            _write(_place(out[index : index + 1], tile, space), (_inside(x, tile, space) for x in made))
    return out


@torch.no_grad()
def encode_streamed(
    vae: HunyuanVAE, pixels: Tensor, plan: StreamPlan, on_tile: OnTile | None = None,
    *, generator: torch.Generator | None = None, output_device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """Unscaled latents (B, C, T, h, w), fp32, of pixels (B, 3, F, H, W) in [-1, 1]; see `decode_streamed`.

    The posterior mean, or with a generator one sample.

    Raises:
        ValueError: a size that the VAE cannot take.
    """
    shape = latents_of_pixels(pixels.shape, vae.config)
    units = encoder_units(vae)
    cut = encoder_cut(units, plan.exact_levels)
    fine, exact = units[:cut], units[cut:]
    steps = _Steps(on_tile, shape.batch * _count(units, fine, plan, shape, math.ceil(pixels.shape[2] / plan.frames)))
    clips = []
    for index in range(shape.batch):
        known: Known = {}
        pieces = _split(pixels[index : index + 1], plan.frames)
        if fine:
            layered(fine, _windows(pieces, plan, shape), known, steps, separate=True)
            pieces = _streamed_tiles(fine, pieces, known, plan, shape, steps)
        clips.append(torch.cat(layered(exact, pieces, known, steps), dim=2))
    mean, logvar = torch.cat(clips).to(output_device or pixels.device, torch.float32).chunk(2, dim=1)
    return mean if generator is None else sample_posterior(mean, logvar.clamp(-30.0, 20.0), generator)


def _count(units: Units, fine: Units, plan: StreamPlan, shape: LatentShape, pieces: int) -> int:
    """Steps of one clip: every unit once, the fine ones over samples, and each tile's pieces."""
    return len(units) + (len(plan.tiles(shape)) * pieces if fine else 0)


def _streamed_tiles(
    fine: Units, pieces: list[Tensor], known: Known, plan: StreamPlan, shape: LatentShape, steps: Callable[[], None]
) -> list[Tensor]:
    """Pixel pieces through the fine levels tile by tile, the tiles' results put together."""
    outs: list[Tensor] = []
    limits = [plan.frames] * len(fine)
    for tile in plan.tiles(shape):
        made = streamed(fine, _read(pieces, tile, shape, steps), known, limits)
        for number, x in enumerate(made):
            scale = x.shape[3] // (tile.rows.stop - tile.rows.start)
            if number == len(outs):
                outs.append(x.new_empty(*x.shape[:3], shape.height * scale, shape.width * scale))
            _place(outs[number], tile, scale).copy_(_inside(x, tile, scale))
    return outs


def _windows(pieces: list[Tensor], plan: StreamPlan, shape: LatentShape) -> list[Tensor]:
    """The samples of the plan, cut from the pieces of a clip at any level: each a latent frame and the frame before."""
    space = pieces[0].shape[3] // shape.height
    time = max(1, (sum(piece.shape[2] for piece in pieces) - 1) // max(1, shape.frames - 1))
    windows = []
    for frame, row, column in plan.window_places(shape):
        rows = slice(row * space, (row + plan.window_height) * space)
        columns = slice(column * space, (column + plan.window_width) * space)
        # Latent frame k ends with frame time*k of this level; the one before it begins the sample, as causal context.
        windows.append(_cut_time(pieces, time * max(0, frame - 1), time * frame + 1, rows, columns))
    return windows


def _cut_time(pieces: list[Tensor], begin: int, end: int, rows: slice, columns: slice) -> Tensor:
    """Frames [begin, end) of a clip that lies in pieces, cut in space."""
    found, start = [], 0
    for piece in pieces:
        stop = start + piece.shape[2]
        if start < end and begin < stop:
            found.append(piece[:, :, max(0, begin - start) : end - start, rows, columns])
        start = stop
    return torch.cat(found, dim=2)


def _split(clip: Tensor, frames: int) -> list[Tensor]:
    return list(clip.split(frames, dim=2))


def _limits(units: Units, frames: int) -> list[int]:
    """After each of the decoder's last units the frames there that are `frames` pixel frames."""
    time = round(math.prod(unit.factor[0] for unit in units if isinstance(unit, Upsample)))
    limits = []
    for unit in units:
        if isinstance(unit, Upsample):
            time = round(time / unit.factor[0])
        limits.append(max(1, frames // time))
    return limits


def _read(pieces: Iterable[Tensor], tile: Tile, shape: LatentShape, steps: Callable[[], None]) -> Iterator[Tensor]:
    """What a tile reads of each piece, margins included."""
    for x in pieces:
        scale = x.shape[3] // shape.height
        yield x[(..., *(slice(span.start * scale, span.stop * scale) for span in (tile.rows, tile.columns)))]
        steps()


def _inside(x: Tensor, tile: Tile, scale: int) -> Tensor:
    """A tile's result without its margins."""
    spans = (tile.rows, tile.columns)
    return x[(..., *(slice((s.keep_start - s.start) * scale, (s.keep_stop - s.start) * scale) for s in spans))]


def _place(x: Tensor, tile: Tile, scale: int) -> Tensor:
    """Where a tile's result goes."""
    return x[(..., *(slice(s.keep_start * scale, s.keep_stop * scale) for s in (tile.rows, tile.columns)))]


def _write(out: Tensor, pieces: Iterable[Tensor]) -> None:
    """Pieces into a clip (1, C, T, H, W), one after the other."""
    start = 0
    for x in pieces:
        out[:, :, start : start + x.shape[2]].copy_(x)
        start += x.shape[2]
    assert start == out.shape[2], f"{start} of {out.shape[2]} frames were made"


class _Steps:
    """Counts steps for whoever watches."""

    def __init__(self, on_tile: OnTile | None, total: int) -> None:
        self.on_tile, self.done, self.total = on_tile, 0, total

    def __call__(self) -> None:
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, self.total)
