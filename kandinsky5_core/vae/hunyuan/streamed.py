"""A clip through the layers a few frames at a time, with the norms' statistics given: memory does not grow with it.

Pieces are (1, C, T, H, W), in order. What a layer keeps of earlier frames lies in objects of one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from .carry import conv_of
from .layers import CausalConv3d, Downsample, ResnetBlock, Upsample
from .norms import Known, normed_silu
from .units import Head


def streamed(
    units: Sequence[nn.Module | Head], pieces: Iterable[Tensor], known: Known, limits: Sequence[int]
) -> Iterator[Tensor]:
    """`units` piece by piece, each piece through all of them before the next is read.

    Args:
        units: None of them attention, which looks at all frames.
        known: statistics of all their norms.
        limits: for each unit the most frames a piece may have after it; a longer one goes on in parts.
    """
    for unit, limit in zip(units, limits, strict=True):
        pieces = _parts(filter(_is_made, map(_step(unit, known), pieces)), limit)
    return iter(pieces)


def _is_made(x: Tensor | None) -> bool:
    return x is not None


def _parts(pieces: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    for x in pieces:
        if x.shape[2] <= limit:
            parts = [x]
        else:
            parts = list(x.split(limit, dim=2))
        del x
        parts.reverse()
        while parts:
            yield parts.pop()


class _Resnet:
    def __init__(self, block: ResnetBlock, known: Known) -> None:
        self.block, self.known = block, known
        self.conv1, self.conv2 = conv_of(block.conv1), conv_of(block.conv2)

    def __call__(self, x: Tensor) -> Tensor:
        block, known = self.block, self.known
        joined = self.conv1.join(normed_silu(block.norm1, known[block.norm1], x))
        residual = x if block.conv_shortcut is None else block.conv_shortcut(x)
        del x
        # Each name is used again as soon as it can be, so that what it held is freed: this is where memory peaks.
        hidden = self.conv1.convolve(joined)
        del joined
        hidden = normed_silu(block.norm2, known[block.norm2], hidden)
        joined = self.conv2.join(hidden)
        del hidden
        return self.conv2.convolve(joined).add_(residual)


class _Conv:
    def __init__(self, layer: CausalConv3d | Upsample) -> None:
        self.conv = conv_of(layer)

    def __call__(self, x: Tensor) -> Tensor | None:
        joined = self.conv.join(x)
        del x
        return self.conv.convolve(joined)


class _Head:
    def __init__(self, head: Head, known: Known) -> None:
        self.norm, self.moments, self.conv = head.norm, known[head.norm], conv_of(head.conv)

    def __call__(self, x: Tensor) -> Tensor:
        joined = self.conv.join(normed_silu(self.norm, self.moments, x))
        del x
        return self.conv.convolve(joined)


def _step(unit: nn.Module | Head, known: Known) -> object:
    if isinstance(unit, ResnetBlock):
        return _Resnet(unit, known)
    if isinstance(unit, Head):
        return _Head(unit, known)
    if isinstance(unit, Downsample):
        return _Conv(unit.conv)
    if isinstance(unit, CausalConv3d | Upsample):
        return _Conv(unit)
    return unit
