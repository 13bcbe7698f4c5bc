"""How a VAE pass is cut into tiles: a pure function of the size and a stated memory budget.

The budget is an argument and never the memory that happens to be free: the seams of a tiling are in its output, so
the same request must give the same tiles on every machine and on every day.

Units: latent cells and latent frames, unless a name says pixels. One cell is 8x8 pixels; with the video VAE
latent frame 0 is one pixel frame and every later one is four.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import VAEConfig
from ..shapes import LatentShape, VideoShape

DEFAULT_BUDGET_BYTES = 4 * 2**30
OVERLAP_CELLS = 4
"""Cross-fade between neighbours in space: 32 pixels, as in the official release."""
OVERLAP_FRAMES = 3
"""Latent frames shared by neighbours in time: one is context, two (8 pixel frames) are cross-faded."""

# Smallest tile tried, (latent frames, cells a side), best first: 17 frames of 256 pixels is what the official tiles
# come down to; below that seams show, and it is done only when the budget allows nothing else.
_FLOORS = ((5, 32), (5, 16), (3, 16), (2, 8))
# GPU kernels index a tensor with 32 bits.
_MAX_TENSOR_ELEMENTS = 2**31 - 1
# Room for what a convolution kernel takes beside its input and output; the live tensors below are exact.
WORKSPACE = 1.25
# Live tensors at the finest level, where the peak is: how many, of which width (0 the finest level's, 1 the next's).
# Video decoding peaks in the last upsampling: the upsampled frames, the same joined to frame 0, padded, convolved, and
# the coarser inputs. Encoding peaks in the second convolution of a resnet of the first level. The 2-D VAE makes no
# padded copies and joins nothing.
_LIVE = {
    ("hunyuan", "decode"): (4.5, 1),
    ("hunyuan", "encode"): (6.0, 0),
    ("flux", "decode"): (3.0, 1),
    ("flux", "encode"): (5.0, 0),
}
# Frames that causal padding puts before the one padded copy; for a single frame they are most of it.
_PADDED_FRAMES = {"hunyuan": 2, "flux": 0}


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Tile sizes and overlaps in latent cells; a tile at least as large as the latents on an axis leaves it whole."""

    frames: int
    height: int
    width: int
    overlap_frames: int = 0
    """With the causal video VAE at least 1 where `frames` cuts: a piece's first latent frame is context and dropped."""
    overlap_height: int = 0
    overlap_width: int = 0
    batch: int = 1
    """Clips of the batch in one pass."""

    def __post_init__(self) -> None:
        for axis in ("frames", "height", "width"):
            tile, overlap = getattr(self, axis), getattr(self, f"overlap_{axis}")
            if not 0 <= overlap < tile:
                raise ValueError(
                    f"tile {axis} {tile} does not go with overlap_{axis} {overlap}: use 0 <= overlap < tile, in cells"
                )
        if self.batch < 1:
            raise ValueError(f"tile batch {self.batch} must be at least 1")

    def num_tiles(self, latent_shape: Sequence[int]) -> int:
        """Passes through the VAE that latents of shape (B, C, T, h, w) take."""
        shape = LatentShape(*latent_shape)
        return (
            math.ceil(shape.batch / self.batch)
            * num_pieces(shape.frames, self.frames, self.overlap_frames)
            * num_pieces(shape.height, self.height, self.overlap_height)
            * num_pieces(shape.width, self.width, self.overlap_width)
        )


def tile_work(plan: TilePlan, latent_shape: Sequence[int], config: VAEConfig) -> float:
    """Pixels computed, as a multiple of the clip's: overlaps are computed for each tile that shares them."""
    shape = LatentShape(*latent_shape)._replace(batch=1)
    sizes = {axis: min(getattr(plan, axis), getattr(shape, axis)) for axis in ("frames", "height", "width")}
    tile, clip = (math.prod(VideoShape.from_latent(each, config)) for each in (shape._replace(**sizes), shape))
    return plan.num_tiles(shape) * tile / clip


def num_pieces(size: int, tile: int, overlap: int) -> int:
    """Pieces of length `tile` that cover an axis of `size` with at least `overlap` shared by neighbours."""
    return 1 if size <= tile else math.ceil((size - overlap) / (tile - overlap))


def piece_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the pieces of one axis begin; the last is moved back so that it ends with the axis."""
    stride = tile - overlap
    return [max(0, min(i * stride, size - tile)) for i in range(num_pieces(size, tile, overlap))]


def is_causal(config: VAEConfig) -> bool:
    """Whether a piece that does not begin the clip needs a latent frame of context."""
    return config.kind == "hunyuan"


def activation_bytes(
    latent_shape: Sequence[int], config: VAEConfig, *, direction: str, bytes_per_element: int = 2
) -> int:
    """Estimated peak memory of one untiled pass without gradients, weights not counted.

    Per pixel of a frame at full resolution: the tensors that live at once at the finest level times their width, and
    a quarter more for workspace. With the released video VAE in 16 bits that is 2880 bytes to decode and 1920 to
    encode; with the FLUX VAE 1920 and 1600.

    Args:
        latent_shape: (B, C, T, h, w).
        direction: 'encode' or 'decode'.
    """
    clip = VideoShape.from_latent(LatentShape(*latent_shape), config)
    num_live, level = _LIVE[config.kind, direction]
    frames = num_live * clip.frames + _PADDED_FRAMES[config.kind]
    elements = frames * clip.batch * clip.height * clip.width * _finest_widths(config)[level]
    return math.ceil(WORKSPACE * elements * bytes_per_element)


def latents_of_pixels(pixel_shape: Sequence[int], config: VAEConfig) -> LatentShape:
    """Shape of the latents that pixels of shape (B, 3, F, H, W) are encoded to.

    Raises:
        ValueError: not such a shape, or sizes that do not fill latent cells.
    """
    if len(pixel_shape) != 5 or pixel_shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixel_shape)}; expected (B, 3, F, H, W)")
    batch, _, frames, height, width = pixel_shape
    space, time = config.spatial_ratio, config.temporal_ratio
    if height % space or width % space or (frames - 1) % time:
        raise ValueError(
            f"{frames} frames of {width}x{height} pixels do not fill latent cells: "
            f"use sides that are multiples of {space} and {time}k+1 frames"
        )
    return LatentShape(batch, config.latent_channels, (frames - 1) // time + 1, height // space, width // space)


def plan_decode(
    latent_shape: Sequence[int],
    vae_config: VAEConfig,
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    bytes_per_element: int = 2,
) -> TilePlan:
    """Tiles for decoding latents of shape (B, C, T, h, w) with activations of at most `budget_bytes`.

    Whole where it fits. Else, of all regular cuts whose tiles fit and are not too small, the one that computes the
    fewest pixels: overlaps are computed twice, so this also means few, large tiles.

    Raises:
        ValueError: the budget does not hold the smallest tile.
    """
    return plan_tiles(LatentShape(*latent_shape), vae_config, "decode", budget_bytes, bytes_per_element)


def plan_encode(
    pixel_shape: Sequence[int],
    vae_config: VAEConfig,
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    bytes_per_element: int = 2,
) -> TilePlan:
    """Tiles, in latent cells, for encoding pixels of shape (B, 3, F, H, W); see `plan_decode`.

    Raises:
        ValueError: the budget does not hold the smallest tile, or the sizes do not fill latent cells.
    """
    return plan_tiles(latents_of_pixels(pixel_shape, vae_config), vae_config, "encode", budget_bytes, bytes_per_element)


def plan_tiles(shape: LatentShape, config: VAEConfig, direction: str, budget: int, element_size: int) -> TilePlan:
    """`plan_decode`, or `plan_encode` for pixels that are encoded to such latents."""

    def fits(tile: LatentShape) -> bool:
        needed = activation_bytes(tile, config, direction=direction, bytes_per_element=element_size)
        return needed <= budget and _largest_tensor(tile, config) <= _MAX_TENSOR_ELEMENTS

    for batch in (shape.batch, 1):
        if fits(shape._replace(batch=batch)):
            return TilePlan(frames=shape.frames, height=shape.height, width=shape.width, batch=batch)
    for floor in _FLOORS:
        tiles = [tile for tile in _regular_cuts(shape, config, *floor) if fits(tile)]
        if tiles:
            return _with_overlaps(min(tiles, key=lambda tile: _work(shape, tile, config)), shape, config)
    smallest = min(_regular_cuts(shape, config, *_FLOORS[-1]), key=math.prod)
    needed = activation_bytes(smallest, config, direction=direction, bytes_per_element=element_size)
    raise ValueError(
        f"VAE memory budget {budget / 2**20:.0f} MiB is too small to {direction}; the smallest tile takes "
        f"{math.ceil(needed / 2**20)} MiB: raise the budget"
    )


def _regular_cuts(shape: LatentShape, config: VAEConfig, min_frames: int, min_side: int) -> list[LatentShape]:
    """Tiles of one clip, one for each number of pieces on each axis: the smallest that makes that number."""
    axes = []
    for axis, floor in (("frames", min_frames if is_causal(config) else 1), ("height", min_side), ("width", min_side)):
        size = getattr(shape, axis)
        # Downwards, so that of the tiles with the same number of pieces the smallest stays.
        lengths = range(size, min(size, floor) - 1, -1)
        axes.append({num_pieces(size, tile, _overlap(axis, tile, size, config)): tile for tile in lengths}.values())
    return [LatentShape(1, shape.channels, *tile) for tile in itertools.product(*axes)]


def _overlap(axis: str, tile: int, size: int, config: VAEConfig) -> int:
    if tile >= size:
        return 0
    if axis != "frames":
        return OVERLAP_CELLS
    return min(OVERLAP_FRAMES, tile - 1) if is_causal(config) else 0


def _with_overlaps(tile: LatentShape, shape: LatentShape, config: VAEConfig) -> TilePlan:
    sizes = {axis: getattr(tile, axis) for axis in ("frames", "height", "width")}
    overlaps = {f"overlap_{axis}": _overlap(axis, size, getattr(shape, axis), config) for axis, size in sizes.items()}
    return TilePlan(**sizes, **overlaps)


def _work(shape: LatentShape, tile: LatentShape, config: VAEConfig) -> tuple[int, int, int, LatentShape]:
    """Pixels computed in all; then fewer tiles, squarer tiles, and the sizes themselves so that ties are settled."""
    num_tiles = _with_overlaps(tile, shape, config).num_tiles(shape)
    pixels = math.prod(VideoShape.from_latent(tile, config))
    return num_tiles * pixels, num_tiles, abs(tile.height - tile.width), tile


def _largest_tensor(shape: LatentShape, config: VAEConfig) -> int:
    """Elements of the largest activation: the input of the last upsampling's convolution with its padding."""
    clip = VideoShape.from_latent(shape, config)
    frames = clip.frames + _PADDED_FRAMES[config.kind]
    return clip.batch * max(_finest_widths(config)) * frames * (clip.height + 2) * (clip.width + 2)


def _finest_widths(config: VAEConfig) -> tuple[int, int]:
    widths = config.block_out_channels
    return widths[0], widths[min(1, len(widths) - 1)]
