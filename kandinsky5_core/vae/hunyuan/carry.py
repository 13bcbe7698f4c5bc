"""The VAE's layers on a clip that comes piece by piece, each keeping what it needs of the pieces before.

An object here belongs to one pass over one clip; the modules keep nothing. Pieces are (1, C, T, H, W), in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolve import convolve
from .layers import CausalConv3d, Upsample


class CarriedConv:
    """A causal convolution that keeps the last frames of its input, so that pieces give what the clip would."""

    def __init__(self, layer: CausalConv3d) -> None:
        self.layer = layer
        self.kernel, self.stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        self.tail: Tensor | None = None
        """Frames, padded in space, that the next output still needs."""

    def join(self, x: Tensor) -> Tensor:
        """The piece behind the frames kept, padded in space; before the first piece its first frame is repeated."""
        side, past = self.layer.padding[0], self.layer.padding[4]
        if side == 0 and past == 0:
            return x
        if self.tail is not None:
            past = self.tail.shape[2]
        batch, channels, frames, height, width = x.shape
        joined = x.new_empty(batch, channels, past + frames, height + 2 * side, width + 2 * side)
        # One copy where padding and joining one after the other would make two.
        new = joined[:, :, past:]
        new[..., side:-side, side:-side] = x
        new[..., :side, side:-side], new[..., -side:, side:-side] = x[..., :1, :], x[..., -1:, :]
        new[..., :side], new[..., -side:] = new[..., side : side + 1], new[..., -side - 1 : -side]
        joined[:, :, :past] = new[:, :, :1] if self.tail is None else self.tail
        self.tail = None
        return joined

    def convolve(self, joined: Tensor) -> Tensor | None:
        """Output frames that `joined` completes, None where it completes none."""
        frames = joined.shape[2]
        made = (frames - self.kernel) // self.stride + 1
        if self.kernel > 1:
            self.tail = joined[:, :, max(0, made) * self.stride :].clone()
        if made <= 0:
            return None
        return convolve(self.layer.conv, joined[:, :, : (made - 1) * self.stride + self.kernel])


class FreshConv:
    """The same for pieces that are clips of their own."""

    def __init__(self, layer: CausalConv3d) -> None:
        self.layer = layer

    def join(self, x: Tensor) -> Tensor:
        """The piece, padded."""
        return CarriedConv(self.layer).join(x)

    def convolve(self, joined: Tensor) -> Tensor:
        """Its output frames."""
        return convolve(self.layer.conv, joined)


class Repeat:
    """Nearest-neighbour upsampling of pieces; the clip's first frame is one pixel frame and is not doubled in time."""

    def __init__(self, layer: Upsample, *, every_piece_is_first: bool = False) -> None:
        self.factor, self.always = layer.factor, every_piece_is_first
        self.first = True

    def __call__(self, x: Tensor) -> Tensor:
        parts = []
        if self.first or self.always:
            parts.append(F.interpolate(x[:, :, 0], scale_factor=self.factor[1:], mode="nearest").unsqueeze(2))
            x = x[:, :, 1:]
        self.first = False
        if x.shape[2]:
            parts.append(F.interpolate(x.contiguous(), scale_factor=self.factor, mode="nearest"))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def conv_of(layer: nn.Module, *, separate: bool) -> CarriedConv | FreshConv:
    """A convolution over pieces of one clip, or over pieces that are `separate` clips."""
    return (FreshConv if separate else CarriedConv)(layer)
