"""What a pass over the HunyuanVideo VAE takes when it goes layer by layer or frame by frame: elements and work.

Pure arithmetic over the units of `hunyuan/units.py`, from a config. F counts pixel frames, `area` pixels of a frame; a
unit at scale (time, space) holds F/time frames of area/space^2 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..config import VAEConfig


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit's sizes."""

    kind: str
    """'conv', 'plain', 'resnet', 'attention', 'up', 'down' or 'head'."""
    wide_in: int
    wide_out: int
    before: tuple[int, int]
    """Scale (time, space) of its input: pixel frames a frame, pixels a position's side."""
    after: tuple[int, int]

    @property
    def work(self) -> float:
        """Multiplications for each pixel of each frame; attention's own, which grows with the clip, left out."""
        return self.plain_work * (self.phase_taps / 27 if self.kind == "up" else 1)

    @property
    def plain_work(self) -> float:
        """The same where upsampling and its convolution come one after the other, as in the plain pass."""
        taps = {"resnet": 27, "plain": 1, "attention": 1}.get(self.kind, 27)
        pairs = self.wide_in * self.wide_out
        if self.kind == "resnet":
            pairs += self.wide_out**2 + (pairs / taps if self.wide_in != self.wide_out else 0)
        if self.kind == "attention":
            pairs *= 4
        time, space = self.after
        return taps * pairs / (time * space**2)

    @property
    def doubles_time(self) -> bool:
        """Whether an upsampling makes two frames of one."""
        return self.after[0] < self.before[0]

    @property
    def phases(self) -> int:
        """Outputs that an upsampling makes of one position, each with a kernel of its own."""
        return 8 if self.doubles_time else 4

    @property
    def phase_taps(self) -> int:
        """Taps of such a kernel."""
        return 8 if self.doubles_time else 12

    @property
    def folded(self) -> int:
        """Elements of such kernels, which are made for a pass."""
        return self.phases * self.phase_taps * self.wide_in * self.wide_out if self.kind == "up" else 0

    @property
    def reach(self) -> int:
        """Pixels to each side that one output depends on, in its own layers."""
        time, space = (self.after if self.kind == "up" else self.before)  # noqa: RUF059
        return space * {"resnet": 2, "plain": 0, "attention": 0}.get(self.kind, 1)

    def kept(self) -> float:
        """Elements a pixel of the area that its convolutions keep between pieces: the last frames of their inputs."""
        past = {"plain": 0, "attention": 0, "up": 1 if self.doubles_time else 2}.get(self.kind, 2)
        wide = self.wide_in + (self.wide_out if self.kind == "resnet" else 0)
        return past * wide / self.before[1] ** 2


def decoder_costs(config: VAEConfig) -> list[Unit]:
    """The rows of `decoder_units`."""
    widths = config.block_out_channels[::-1]
    scales = _decoder_scales(config)
    rows = _rows(
        [("plain", config.latent_channels), ("conv", widths[0]), ("resnet", widths[0]), ("attention", widths[0]),
         ("resnet", widths[0])], config.latent_channels, scales[0],
    )  # fmt: skip
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        rows += _rows([("resnet", width)] * (config.layers_per_block + 1), before, scales[level])
        if level + 1 < len(widths):
            rows.append(
                Unit(kind="up", wide_in=width, wide_out=width, before=scales[level], after=scales[level + 1])
            )
    return [*rows, *_rows([("head", 3)], widths[-1], scales[-1])]


def encoder_costs(config: VAEConfig) -> list[Unit]:
    """The rows of `encoder_units`."""
    widths, scales, moments = config.block_out_channels, _scales(config), 2 * config.latent_channels
    rows = _rows([("conv", widths[0])], 3, scales[0])
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        rows += _rows([("resnet", width)] * config.layers_per_block, before, scales[level])
        if level + 1 < len(widths):
            rows.append(
                Unit(kind="down", wide_in=width, wide_out=width, before=scales[level], after=scales[level + 1])
            )
    last = [("resnet", widths[-1]), ("attention", widths[-1]), ("resnet", widths[-1]), ("head", moments),
            ("plain", moments)]  # fmt: skip
    return [*rows, *_rows(last, widths[-1], scales[-1])]


def _scales(config: VAEConfig) -> list[tuple[int, int]]:
    """(time, space) of each of the encoder's levels, finest first: time is halved on the innermost ones."""
    levels = len(config.block_out_channels)
    in_time = config.temporal_ratio.bit_length() - 1
    return [(2 ** max(0, level - (levels - 1 - in_time)), 2**level) for level in range(levels)]


def _decoder_scales(config: VAEConfig) -> list[tuple[int, int]]:
    """The same of the decoder's levels, coarsest first: its innermost upsampling leaves time alone too."""
    ratios = [time for time, _ in _scales(config)]
    levels = len(ratios)
    return [(ratios[-1] // time, 2 ** (levels - 1 - level)) for level, time in enumerate(ratios)]


def _rows(kinds: Sequence[tuple[str, int]], wide_in: int, scale: tuple[int, int]) -> list[Unit]:
    widths = [wide_in, *(width for _, width in kinds)]
    return [
        Unit(kind=kind, wide_in=a, wide_out=b, before=scale, after=scale)
        for (kind, _), (a, b) in zip(kinds, pairwise(widths), strict=True)
    ]


def frames_at(frames: int, time: int) -> int:
    """Frames of a clip at a scale; a clip has one more than a multiple."""
    return -(-frames // time)


def layered_elements(units: Sequence[Unit], frames: int, piece: int, area: float) -> float:
    """Most elements that `layered` holds at once over clips of `frames` frames in pieces of `piece`."""
    return max((_layered(unit, frames, piece, area) for unit in units), default=0.0)


def _layered(unit: Unit, frames: int, piece: int, area: float) -> float:
    def clip(width: int, scale: tuple[int, int], count: int = frames) -> float:
        return width * frames_at(count, scale[0]) * area / scale[1] ** 2

    def joining(width: int, scale: tuple[int, int]) -> float:
        """A padded piece behind the frames kept, while these are still there themselves."""
        return width * (frames_at(piece, scale[0]) + 4) * area / scale[1] ** 2

    source, result = clip(unit.wide_in, unit.before), clip(unit.wide_out, unit.after)
    if unit.kind == "resnet":
        held = max(2 * result, source)
        wide = max(unit.wide_in, unit.wide_out)
        return held + clip(wide, unit.before, piece) + joining(wide, unit.before)
    if unit.kind == "attention":
        return 3 * source + 5 * clip(unit.wide_in, unit.before, piece)
    if unit.kind == "up":
        phase = clip(unit.wide_out, unit.after, piece) / unit.phases
        return max(source, result) + joining(unit.wide_in, unit.before) + phase + unit.folded
    return max(source, result) + clip(unit.wide_in, unit.before, piece) + joining(unit.wide_in, unit.before)


def streamed_elements(units: Sequence[Unit], piece: int, limit: int, area: float) -> float:
    """Most elements that `streamed` holds at once: what the layers keep, and one piece's work.

    Args:
        piece: pixel frames that come in together.
        limit: pixel frames that go on together; what waits for its turn is held.
    """
    kept = sum(unit.kept() * area + unit.folded for unit in units)
    waiting, most = 0.0, 0.0
    frames = piece
    for unit in units:
        most = max(most, waiting + _working(unit, frames) * area)
        if frames > max(limit, unit.after[0]):
            waiting += unit.wide_out * frames_at(frames, unit.after[0]) / unit.after[1] ** 2 * area
            frames = max(limit, unit.after[0])
    return kept + most


def _working(unit: Unit, frames: int) -> float:
    """Elements a pixel of the area while one piece is in a unit: input, what is normalised, its padded copy, output."""
    (time, space), wide = unit.before, unit.wide_in
    if unit.kind == "up":
        made = unit.wide_out * frames_at(frames, unit.after[0]) / unit.after[1] ** 2
        return made * (1 + 1 / unit.phases) + wide * (frames_at(frames, time) + 2) / space**2
    count = frames_at(frames, time)
    first = wide * (3 * count + 2)
    if unit.kind == "resnet":
        convolving = wide * (count + 2) + (unit.wide_out + (wide if wide == unit.wide_out else unit.wide_out)) * count
        first = max(first, convolving, unit.wide_out * (3 * count + 2))
    return first / space**2
