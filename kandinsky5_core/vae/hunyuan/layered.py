"""One layer after another over a clip that lies in pieces: exact, because every norm sees all pieces first.

Memory holds the clip at one layer (two inside a resnet) and one piece's work, where the plain forward also holds
padded, normalised and convolved copies of the whole clip. Pieces are (1, C, T, H, W); the list that is passed in is
emptied while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .carry import conv_of
from .layers import CausalConv3d, Downsample, FrameCausalAttention, ResnetBlock, Upsample
from .norms import Known, Moments, moments_over, normed, normed_silu
from .units import Head

OnStep = Callable[[], None]


def layered(
    units: Sequence[nn.Module | Head],
    pieces: list[Tensor],
    known: Known,
    on_step: OnStep,
    *,
    separate: bool = False,
) -> list[Tensor]:
    """`units` over all pieces; the statistics of every norm are put into `known`.

    Args:
        separate: the pieces are clips of their own (samples of one), of which the norms see all together.
        on_step: called after each unit.
    """
    for unit in units:
        pieces = _run(unit, pieces, known, separate)
        on_step()
    return pieces


def _run(unit: nn.Module | Head, pieces: list[Tensor], known: Known, separate: bool) -> list[Tensor]:
    if isinstance(unit, ResnetBlock):
        return _resnet(unit, pieces, known, separate)
    if isinstance(unit, FrameCausalAttention):
        return _attention(unit, pieces, known)
    if isinstance(unit, Head):
        known[unit.norm] = moments_over(unit.norm, pieces)
        return _convolved(unit.conv, pieces, separate, before=lambda x: normed_silu(unit.norm, known[unit.norm], x))
    if isinstance(unit, Downsample):
        return _convolved(unit.conv, pieces, separate)
    if isinstance(unit, CausalConv3d | Upsample):
        return _convolved(unit, pieces, separate)
    return [unit(x) for x in _taken(pieces)]


def _taken(pieces: list[Tensor]) -> Iterator[Tensor]:
    """The pieces, none of them kept by the list once it is handed out."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def _convolved(
    layer: CausalConv3d | Upsample, pieces: list[Tensor], separate: bool,
    before: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:  # fmt: skip
    conv = conv_of(layer, separate=separate)

    def step(x: Tensor) -> Tensor | None:
        x = before(x)
        joined = conv.join(x)
        del x
        return conv.convolve(joined)

    return [out for out in map(step, _taken(pieces)) if out is not None]


def _resnet(block: ResnetBlock, pieces: list[Tensor], known: Known, separate: bool) -> list[Tensor]:
    known[block.norm1] = moments_over(block.norm1, pieces)
    conv1, conv2 = conv_of(block.conv1, separate=separate), conv_of(block.conv2, separate=separate)
    residuals: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        joined = conv1.join(normed_silu(block.norm1, known[block.norm1], x))
        # The shortcut is taken here, so that the wide input need not stay.
        residuals.append(x if block.conv_shortcut is None else block.conv_shortcut(x))
        del x
        return conv1.convolve(joined)

    hidden = list(map(first, _taken(pieces)))
    known[block.norm2] = moments_over(block.norm2, hidden)

    def second(x: Tensor) -> Tensor:
        joined = conv2.join(normed_silu(block.norm2, known[block.norm2], x))
        del x
        return conv2.convolve(joined)

    return [out.add_(x) for out, x in zip(map(second, _taken(hidden)), _taken(residuals), strict=True)]


def _attention(layer: FrameCausalAttention, pieces: list[Tensor], known: Known) -> list[Tensor]:
    """Queries of one frame at a time over the keys and values of all frames, which stay."""
    known[layer.group_norm] = moments = moments_over(layer.group_norm, pieces)
    batch, channels, _, height, width = pieces[0].shape
    cells, frames = height * width, sum(x.shape[2] for x in pieces)
    k, v = (pieces[0].new_empty(batch, 1, frames * cells, channels) for _ in range(2))
    end = 0
    for x in pieces:
        tokens = _tokens(layer, moments, x)
        span = slice(end, end := end + tokens.shape[1])
        k[:, 0, span], v[:, 0, span] = layer.to_k(tokens), layer.to_v(tokens)
    seen = 0

    def attended(x: Tensor) -> Tensor:
        nonlocal seen
        outs = []
        for q in layer.to_q(_tokens(layer, moments, x)).split(cells, dim=1):
            seen += cells
            outs.append(F.scaled_dot_product_attention(q[:, None], k[:, :, :seen], v[:, :, :seen])[:, 0])
        hidden = layer.to_out[0](torch.cat(outs, dim=1))
        return x + rearrange(hidden, "b (t h w) c -> b c t h w", h=height, w=width)

    return list(map(attended, _taken(pieces)))


def _tokens(layer: FrameCausalAttention, moments: Moments, x: Tensor) -> Tensor:
    return rearrange(normed(layer.group_norm, moments, x), "b c t h w -> b (t h w) c")
