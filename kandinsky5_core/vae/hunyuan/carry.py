"""The VAE's layers on a clip that comes piece by piece, each keeping what it needs of the pieces before.

An object here belongs to one pass over one clip; the modules keep nothing. Pieces are (1, C, T, H, W), in order.
"""

from __future__ import annotations

from torch import Tensor

from .convolve import convolve, convolve_with
from .layers import CausalConv3d, Upsample
from .upsample import Kernels, fold_kernels


class Carry:
    """Joins each piece to the frames kept of those before, padded in space; a clip's first frame is repeated."""

    def __init__(self, side: int, past: int) -> None:
        self.side, self.past = side, past
        self.tail: Tensor | None = None
        """Frames, padded in space, that the next output still needs."""

    def join(self, x: Tensor) -> Tensor:
        """The piece behind the frames kept."""
        side, past = self.side, self.past
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

    def keep(self, joined: Tensor, used: int) -> None:
        """What comes after the first `used` frames."""
        if self.past:
            self.tail = joined[:, :, used:].clone()


class CarriedConv:
    """A causal convolution that keeps the last frames of its input, so that pieces give what the clip would."""

    def __init__(self, layer: CausalConv3d) -> None:
        self.conv, self.kernel, self.stride = layer.conv, layer.conv.kernel_size[0], layer.conv.stride[0]
        self.carry = Carry(layer.padding[0], layer.padding[4])

    def join(self, x: Tensor) -> Tensor:
        """The piece behind the frames kept, padded."""
        return self.carry.join(x)

    def restart(self) -> None:
        """Go on with another clip."""
        self.carry.tail = None

    def convolve(self, joined: Tensor) -> Tensor | None:
        """Output frames that `joined` completes, None where it completes none."""
        made = (joined.shape[2] - self.kernel) // self.stride + 1
        self.carry.keep(joined, max(0, made) * self.stride)
        if made <= 0:
            return None
        return convolve(self.conv, joined[:, :, : (made - 1) * self.stride + self.kernel])


class CarriedUpsample:
    """An upsampling and its convolution; the clip's first frame is one pixel frame and is not doubled in time."""

    def __init__(self, layer: Upsample) -> None:
        self.layer, self.in_time = layer, int(layer.factor[0])
        self.carry = Carry(1, 3 - self.in_time)
        self.kernels: Kernels = {}
        self.first = True

    def join(self, x: Tensor) -> Tensor:
        """The piece behind the frames kept, padded, not yet upsampled."""
        return self.carry.join(x)

    def restart(self) -> None:
        """Go on with another clip."""
        self.carry.tail, self.first = None, True

    def convolve(self, joined: Tensor) -> Tensor:
        """The output frames of a piece."""
        self.kernels = self.kernels or fold_kernels(self.layer, joined)
        bias = self.layer.conv.conv.bias.to(joined)
        frames, height, width = joined.shape[2] - self.carry.past, joined.shape[3] - 2, joined.shape[4] - 2
        # Of the pair that the clip's first frame would be only the second is there.
        missing = int(self.first and self.in_time == 2)
        self.first = False
        self.carry.keep(joined, frames)
        size = (frames * self.in_time - missing, 2 * height, 2 * width)
        out = joined.new_empty(joined.shape[0], len(bias), *size)
        for (t, i, j), kernel in self.kernels.items():
            skipped = missing if t == 0 else 0
            if skipped < frames:
                seen = joined[:, :, skipped:, i : i + height + 1, j : j + width + 1]
                begin = t - missing + skipped * self.in_time
                out[:, :, begin :: self.in_time, i::2, j::2] = convolve_with(seen, kernel, bias)
        return out


class Fresh:
    """The same for pieces that are clips of their own."""

    def __init__(self, carried: CarriedConv | CarriedUpsample) -> None:
        self.carried = carried

    def join(self, x: Tensor) -> Tensor:
        """The piece, padded."""
        return self.carried.join(x)

    def convolve(self, joined: Tensor) -> Tensor:
        """Its output frames."""
        out = self.carried.convolve(joined)
        self.carried.restart()
        return out


Carried = CarriedConv | CarriedUpsample | Fresh


def conv_of(layer: CausalConv3d | Upsample, *, separate: bool = False) -> Carried:
    """A convolution over pieces of one clip, or over pieces that are `separate` clips."""
    carried = CarriedUpsample(layer) if isinstance(layer, Upsample) else CarriedConv(layer)
    return Fresh(carried) if separate else carried
