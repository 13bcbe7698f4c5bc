"""One convolution of a small piece, by the kernel that suits it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)`, x (B, C, T, H, W) padded already.

    On one CPU thread PyTorch leaves small inputs to a kernel that copies each 27 times and takes 5 to 10 times as long
    as oneDNN's, which it takes for large ones: pieces of a clip are small, so it is asked for by name.
    """
    ours = type(conv) is nn.Conv3d and x.device.type == "cpu" and x.dtype == conv.weight.dtype == torch.float32
    if not ours or conv.kernel_size[0] == 1 or not torch.backends.mkldnn.is_available():
        return conv(x)
    padding, stride, dilation = [0, 0, 0], list(conv.stride), list(conv.dilation)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, stride, dilation, conv.groups)
