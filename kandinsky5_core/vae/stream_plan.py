"""How a pass over the HunyuanVideo VAE is cut in time: a pure function of the size and a stated memory budget.

The levels of the VAE that lie coarse are run over the whole clip, layer by layer and exactly: they are small. The fine
ones are streamed a few frames at a time; the statistics of their norms, which the plain pass takes over the whole clip,
come from samples of it (windows), the same for all frames and all tiles, so that neither has seams. A tile brings along
as much margin as its convolutions reach, so nothing is blended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import VAEConfig
from ..shapes import LatentShape, VideoShape
from .stream_cost import Unit, decoder_costs, encoder_costs, frames_at, layered_elements, streamed_elements

WORKSPACE = 1.25
"""Room for what a convolution kernel takes beside its input and output."""
PIECES = (16, 8, 4, 2, 1)
"""Pixel frames at a time, best first: more frames copy less of what is carried."""
WINDOW_FRAMES = 5
"""Pixel frames of one sample: two latent frames, the first of them mostly context."""
MAX_WINDOWS = 6
MIN_SIDE = 8
"""Smallest tile, in cells: below that the margins are most of the work."""


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


def _spans(size: int, tile: int, margin: int) -> list[Span]:
    edges = [*range(0, size, tile), size]
    return [
        Span(max(0, a - margin), min(size, b + margin), a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


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
    piece, area = max(plan.frames, config.temporal_ratio), clip.height * clip.width
    coarse = layered_elements(costs.exact, clip.frames, piece, area)
    if not costs.fine:
        return math.ceil(WORKSPACE * coarse * bytes_per_element)
    edge = costs.fine[0].before if direction == "decode" else costs.fine[-1].after
    width = costs.fine[0].wide_in if direction == "decode" else costs.fine[-1].wide_out
    held = width * frames_at(clip.frames, edge[0]) * area / edge[1] ** 2
    cell = config.spatial_ratio**2
    tile = max((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in plan.tiles(shape))
    window = plan.window_height * plan.window_width * cell
    frames = min(WINDOW_FRAMES, clip.frames)
    sampling = layered_elements(costs.fine, plan.windows * frames, frames, window)
    streaming = streamed_elements(costs.fine, piece if direction == "decode" else plan.frames, plan.frames, tile * cell)
    return math.ceil(WORKSPACE * bytes_per_element * max(coarse, held + max(sampling, streaming)))


def stream_work(plan: StreamPlan, latent_shape: Sequence[int], config: VAEConfig, *, direction: str) -> float:
    """Convolutions' work as a multiple of the plain pass's: margins and samples are computed beside it."""
    shape = LatentShape(*latent_shape)
    costs = Costs.of(config, direction, plan.exact_levels)
    exact, fine = (sum(unit.work for unit in units) for units in (costs.exact, costs.fine))
    cells = shape.height * shape.width
    read = sum((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in plan.tiles(shape))
    clip = VideoShape.from_latent(shape, config)
    sampled = plan.windows * min(WINDOW_FRAMES, clip.frames) * plan.window_height * plan.window_width
    return (exact + fine * (read / cells + sampled / (cells * clip.frames))) / (exact + fine)


def plan_stream(
    shape: LatentShape, config: VAEConfig, direction: str, budget_bytes: int, bytes_per_element: int
) -> StreamPlan | None:
    """The plan of least work that fits; exact where all levels fit; None where nothing does."""

    def fits(plan: StreamPlan) -> bool:
        needed = stream_bytes(plan, shape, config, direction=direction, bytes_per_element=bytes_per_element)
        return needed <= budget_bytes

    levels = len(config.block_out_channels)
    for frames in PIECES:
        exact = StreamPlan(exact_levels=levels, frames=frames, height=shape.height, width=shape.width)
        if frames >= config.temporal_ratio and fits(exact):
            return exact
    found = [plan for plan in _candidates(shape, config, direction) if fits(plan)]
    # Ties: more levels exact, then longer pieces, larger samples, squarer tiles.
    return min(
        found,
        key=lambda plan: (
            stream_work(plan, shape, config, direction=direction), -plan.exact_levels, -plan.frames, -plan.windows,
            abs(plan.height - plan.width), plan.height,
        ),
        default=None,
    )  # fmt: skip


def _candidates(shape: LatentShape, config: VAEConfig, direction: str) -> Iterator[StreamPlan]:
    raise NotImplementedError
