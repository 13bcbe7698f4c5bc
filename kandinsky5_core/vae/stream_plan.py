"""How a pass over the HunyuanVideo VAE is cut in time: a pure function of the size and a stated memory budget.

The levels of the VAE that lie coarse are run over the whole clip, layer by layer and exactly: they are small. The fine
ones are streamed a few frames at a time; the statistics of their norms, which the plain pass takes over the whole clip,
come from samples of it (windows), the same for all frames and all tiles, so that neither has seams. A tile brings along
as much margin as its convolutions reach, so nothing is blended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..config import VAEConfig
from ..shapes import LatentShape, VideoShape
from .stream_cost import Unit, decoder_costs, encoder_costs, frames_at, layered_elements, streamed_elements

WORKSPACE = 1.25
"""Room for what a convolution kernel takes beside its input and output."""
PIECES = (16, 8, 4, 2, 1)
"""Pixel frames at a time, best first: more frames copy less of what is carried."""
CARRYING = 0.15
"""What carrying costs with one frame at a time, as a share of the work: copies, and on a CPU no pairs of frames."""
WINDOW_FRAMES = 5
"""Pixel frames of one sample: two latent frames, the first of them mostly context."""
LATENTS_PER_WINDOW = 10
MAX_WINDOWS = 6
MIN_SIDE = 8
"""Smallest tile, in cells: below that the margins are most of the work."""
MAX_TENSOR_ELEMENTS = 2**31 - 1
"""GPU kernels index a tensor with 32 bits."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """How one clip is streamed; the clips of a batch go one after the other."""

    exact_levels: int
    """Coarse levels run over the whole clip; all of them: nothing is sampled, the result is the plain pass's."""
    frames: int
    """Pixel frames that go through the fine levels together."""
    height: int
    """Cells of one tile without its margin; as large as the latents: no tiles."""
    width: int
    margin: int = 0
    """Cells beside a tile that are computed and dropped: what its convolutions reach."""
    windows: int = 0
    """Samples for the statistics of the fine levels' norms."""
    window_height: int = 0
    """Cells of a sample."""
    window_width: int = 0

    def __post_init__(self) -> None:
        for name, least in (("exact_levels", 1), ("frames", 1), ("height", 1), ("width", 1), ("margin", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"stream plan {name} {getattr(self, name)} must be at least {least}")

    def num_tiles(self, latent_shape: Sequence[int]) -> int:
        """Tiles that each clip of latents (B, C, T, h, w) goes through, times the clips."""
        shape = LatentShape(*latent_shape)
        return shape.batch * len(self.tiles(shape))

    def tiles(self, shape: LatentShape) -> list[Tile]:
        """The tiles of one clip, row by row."""
        return [
            Tile(rows, columns)
            for rows in _spans(shape.height, self.height, self.margin)
            for columns in _spans(shape.width, self.width, self.margin)
        ]

    def window_places(self, shape: LatentShape) -> list[tuple[int, int, int]]:
        """Where the samples lie: (latent frame, row, column) of each; spread evenly, the same on every run."""
        places = []
        for index in range(self.windows):
            frame = min(shape.frames - 1, math.floor((index + 0.5) / self.windows * shape.frames))
            # Steps of the plastic number: points of the plane that stay far from each other for any count.
            row = math.floor((0.5 + 0.7548776662 * index) % 1 * (shape.height - self.window_height + 1))
            column = math.floor((0.5 + 0.5698402910 * index) % 1 * (shape.width - self.window_width + 1))
            places.append((frame, row, column))
        return places


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in cells: what is read, and what of it is kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class Tile:
    """A tile of a clip."""

    rows: Span
    columns: Span

    @property
    def cells(self) -> int:
        """Cells of a frame that are read."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


def _spans(size: int, tile: int, margin: int) -> list[Span]:
    edges = [*range(0, size, tile), size]
    return [Span(max(0, a - margin), min(size, b + margin), a, b) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Costs:
    """The units of one direction, split where streaming begins or ends."""

    exact: list[Unit]
    fine: list[Unit]

    @classmethod
    def of(cls, config: VAEConfig, direction: str, exact_levels: int) -> Costs:
        """Split after the coarsest `exact_levels` levels."""
        if direction == "decode":
            units = decoder_costs(config)
            cuts = [index for index, unit in enumerate(units) if unit.kind == "up"]
            cut = [*cuts, len(units)][exact_levels - 1]
            return cls(units[:cut], units[cut:])
        units = encoder_costs(config)
        cut = [0, *(index + 1 for index, unit in enumerate(units) if unit.kind == "down")][-exact_levels]
        return cls(units[cut:], units[:cut])

    def margin(self, config: VAEConfig) -> int:
        """Cells that an output of the fine levels depends on to each side."""
        return math.ceil(sum(unit.reach for unit in self.fine) / config.spatial_ratio)


def stream_bytes(
    plan: StreamPlan, latent_shape: Sequence[int], config: VAEConfig, *, direction: str, bytes_per_element: int = 2
) -> int:
    """Estimated peak memory of a streamed pass without gradients; weights, given tensor and result not counted."""
    shape = LatentShape(*latent_shape)
    clip, costs = VideoShape.from_latent(shape, config), Costs.of(config, direction, plan.exact_levels)
    piece, area = min(clip.frames, max(plan.frames, config.temporal_ratio)), clip.height * clip.width
    coarse = layered_elements(costs.exact, clip.frames, piece, area)
    if not costs.fine:
        return math.ceil(WORKSPACE * coarse * bytes_per_element)
    edge = costs.fine[0].before if direction == "decode" else costs.fine[-1].after
    width = costs.fine[0].wide_in if direction == "decode" else costs.fine[-1].wide_out
    held = width * frames_at(clip.frames, edge[0]) * area / edge[1] ** 2
    cell = config.spatial_ratio**2
    tile = max(tile.cells for tile in plan.tiles(shape))
    window = plan.window_height * plan.window_width * cell
    frames = min(WINDOW_FRAMES, clip.frames)
    sampling = layered_elements(costs.fine, plan.windows * frames, frames, window)
    streaming = streamed_elements(costs.fine, piece if direction == "decode" else plan.frames, plan.frames, tile * cell)
    return math.ceil(WORKSPACE * bytes_per_element * max(coarse, held + max(sampling, streaming)))


def stream_work(plan: StreamPlan, latent_shape: Sequence[int], config: VAEConfig, *, direction: str) -> float:
    """Convolutions' work as a multiple of the plain pass's: margins and samples come beside it, upsampling is less."""
    shape = LatentShape(*latent_shape)
    costs = Costs.of(config, direction, plan.exact_levels)
    exact, fine = (sum(unit.work for unit in units) for units in (costs.exact, costs.fine))
    plain = sum(unit.plain_work for unit in (*costs.exact, *costs.fine))
    cells = shape.height * shape.width
    read = sum(tile.cells for tile in plan.tiles(shape))
    clip = VideoShape.from_latent(shape, config)
    sampled = plan.windows * min(WINDOW_FRAMES, clip.frames) * plan.window_height * plan.window_width
    return (exact + fine * (read / cells + sampled / (cells * clip.frames))) / plain


def plan_stream(
    latent_shape: Sequence[int], config: VAEConfig, *, direction: str, budget_bytes: int, bytes_per_element: int = 2
) -> StreamPlan | None:
    """The plan of least work and carrying that fits; exact where all levels fit; None where nothing does.

    Args:
        latent_shape: (B, C, T, h, w), of the latents to decode or of those that pixels are encoded to.
        direction: 'encode' or 'decode'.
    """
    shape = LatentShape(*latent_shape)._replace(batch=1)

    def fits(plan: StreamPlan) -> bool:
        needed = stream_bytes(plan, shape, config, direction=direction, bytes_per_element=bytes_per_element)
        return needed <= budget_bytes and _largest_tensor(plan, shape, config) <= MAX_TENSOR_ELEMENTS

    levels = len(config.block_out_channels)
    for frames in PIECES:
        exact = StreamPlan(exact_levels=levels, frames=frames, height=shape.height, width=shape.width)
        if fits(exact):
            return exact
    found = [
        plan
        for exact_levels in range(levels - 1, 0, -1)
        for frames in PIECES[2:]
        if (plan := _first_fitting(_tilings(shape, config, direction, exact_levels, frames), fits, shape))
    ]

    def cost(plan: StreamPlan) -> float:
        return stream_work(plan, shape, config, direction=direction) * (1 + CARRYING / plan.frames)

    # Where work is the same, more levels exact.
    return min(found, key=cost, default=None)


def _tilings(
    shape: LatentShape, config: VAEConfig, direction: str, exact_levels: int, frames: int
) -> Iterator[StreamPlan]:
    """Plans with so many levels exact, least work first, each with the smallest samples."""
    margin = Costs.of(config, direction, exact_levels).margin(config)
    window_height, window_width = _window_sizes(shape)[-1]
    for height, width in _tile_sizes(shape, margin):
        yield StreamPlan(
            exact_levels=exact_levels, frames=frames, height=height, width=width, margin=margin,
            windows=num_windows(shape.frames), window_height=window_height, window_width=window_width,
        )  # fmt: skip


def _first_fitting(
    tilings: Iterator[StreamPlan], fits: Callable[[StreamPlan], bool], shape: LatentShape
) -> StreamPlan | None:
    """The first tiling that fits, with the largest samples and then the longest pieces that still do."""
    least = next(filter(fits, tilings), None)
    if least is None:
        return None
    larger = (
        replace(least, window_height=height, window_width=width, frames=frames)
        for height, width in _window_sizes(shape)
        for frames in PIECES
        if frames >= least.frames
    )
    return next(filter(fits, larger), least)


def num_windows(latent_frames: int) -> int:
    """Samples of a clip: one for every ten latent frames, so that at most a fifth of the clip is computed twice."""
    return max(1, min(MAX_WINDOWS, latent_frames // LATENTS_PER_WINDOW))


def _tile_sizes(shape: LatentShape, margin: int) -> list[tuple[int, int]]:
    """Regular cuts of a frame, the one that reads least first."""

    def cuts(size: int) -> list[int]:
        return sorted({math.ceil(size / count) for count in range(1, max(1, size // MIN_SIDE) + 1)})

    def read(size: int, tile: int) -> int:
        return sum(span.stop - span.start for span in _spans(size, tile, margin))

    sizes = itertools.product(cuts(shape.height), cuts(shape.width))
    return sorted(sizes, key=lambda tile: (read(shape.height, tile[0]) * read(shape.width, tile[1]), -tile[0]))


def _window_sizes(shape: LatentShape) -> list[tuple[int, int]]:
    """Samples' sides in cells, largest first: whole frames see what is at their edges too."""
    halves = [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
    sizes = {(math.ceil(shape.height / a), math.ceil(shape.width / b)) for a, b in halves}
    return sorted((size for size in sizes if min(size) >= min(MIN_SIDE, *shape[3:])), reverse=True)


def _largest_tensor(plan: StreamPlan, shape: LatentShape, config: VAEConfig) -> int:
    """Elements of the largest activation that one call sees: a padded piece, or the keys of all frames."""
    frames = max(plan.frames, config.temporal_ratio, WINDOW_FRAMES if plan.windows else 0) + 2
    cells = max(plan.window_height * plan.window_width, *(tile.cells for tile in plan.tiles(shape)))
    wide = max(config.block_out_channels[:2])
    keys = config.block_out_channels[-1] * math.prod(shape[2:])
    return max(wide * frames * (cells * config.spatial_ratio**2), keys)
