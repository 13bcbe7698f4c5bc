"""One convolution of a piece that is padded already, by the way that suits it. Shapes: x (B, C, T, H, W)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PAIRED_POSITIONS = 512
"""Below that many outputs a channel, adding up the kernels of a pair costs more than the products that it saves."""
MIN_PAIRED_CHANNELS = 32
"""Below, passes over memory are most of a convolution, and pairs take more of them."""


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)`, up to rounding."""
    if type(conv) is not nn.Conv3d or conv.kernel_size[0] == 1:
        return conv(x)
    return convolve_with(x, conv.weight, conv.bias, conv.stride)


def convolve_with(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int] = (1, 1, 1)) -> Tensor:
    """The convolution of `x` with `weight` (C_out, C_in, kt, kh, kw), up to rounding.

    In fp32 on a CPU, where products are what takes time, pairs of frames share some (`in_pairs`). In 16 bits the sums
    that they are made of would be rounded, and a GPU multiplies faster than it could pass over memory for them.
    """
    if not (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _has_onednn()):
        return F.conv3d(x, weight, bias, tuple(stride))
    frames, height, width = (size - kernel + 1 for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True))
    pairs = tuple(stride) == (1, 1, 1) and weight.shape[2] == 3 and frames > 1
    if pairs and frames * height * width >= MIN_PAIRED_POSITIONS and min(weight.shape[:2]) >= MIN_PAIRED_CHANNELS:
        return in_pairs(x, weight, bias)
    return _onednn(x, weight, bias, stride)


def in_pairs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Two output frames at a time from four products with 2-D kernels in place of six; stride 1, 3 taps in time.

    Winograd's F(2, 3) along time alone (Lavin and Gray 2015, arXiv:1509.09308): its sums have no factor but one half,
    so that it rounds no worse than the plain sum, which is half as long again.
    """
    frames = x.shape[2] - 2
    paired = frames // 2 * 2
    first, second, third, fourth = (x[:, :, start : start + paired - 1 : 2] for start in range(4))
    past, middle, last = weight.split(1, dim=2)
    whole = _onednn(second + third, (past + middle + last).mul_(0.5), bias)
    out = whole.new_empty(*whole.shape[:2], frames, *whole.shape[3:])
    even, odd = out[:, :, 0:paired:2], out[:, :, 1:paired:2]
    even.copy_(whole), odd.copy_(whole)
    # Each product goes as soon as it is added: two of them at once would be as large as the result.
    del whole
    half = _onednn(third - second, (past - middle + last).mul_(0.5))
    even.add_(half), odd.sub_(half)
    del half
    even.add_(_onednn(first - third, past))
    odd.sub_(_onednn(second - fourth, last))
    if paired < frames:
        out[:, :, paired:] = _onednn(x[:, :, paired:], weight, bias)
    return out


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1, 1)) -> Tensor:
    """By oneDNN, whatever the size.

    On one thread PyTorch leaves small inputs to a kernel that copies each 27 times and takes 5 to 10 times as long;
    pieces of a clip are small.
    """
    return torch.mkldnn_convolution(x, weight, bias, [0, 0, 0], list(stride), [1, 1, 1], 1)
