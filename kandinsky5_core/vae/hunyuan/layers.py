"""Building blocks of the HunyuanVideo VAE: everything is causal in time.

Shapes: B batch, C channels, T frames, H height, W width; activations are (B, C, T, H, W).
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6


class CausalConv3d(nn.Module):
    """3-D convolution that sees the present and the past: replicate padding, all of it before frame t in time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1),
        *, ops: ModuleType,
    ) -> None:  # fmt: skip
        super().__init__()
        side = kernel_size // 2
        self.padding = (side, side, side, side, kernel_size - 1, 0)
        self.conv = ops.Conv3d(in_channels, out_channels, kernel_size, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        # Padding by nothing would be a copy.
        return self.conv(F.pad(x, self.padding, mode="replicate") if any(self.padding) else x)


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.norm1 = ops.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels, ops=ops)
        self.norm2 = ops.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels, ops=ops)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, 1, ops=ops) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """One head over all pixels of the present and earlier frames."""

    def __init__(self, channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.group_norm = ops.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = ops.Linear(channels, channels)
        self.to_k = ops.Linear(channels, channels)
        self.to_v = ops.Linear(channels, channels)
        self.to_out = nn.ModuleList([ops.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        hidden = rearrange(self.group_norm(x), "b c t h w -> b t (h w) c")
        q, k, v = self.to_q(hidden), self.to_k(hidden), self.to_v(hidden)
        # A frame's queries attend to a prefix of the keys, so one call a frame needs no mask at all: memory
        # stays linear in the number of frames where a (T*H*W)^2 mask would not.
        seen = [
            F.scaled_dot_product_attention(
                q[:, t, None], k[:, None, : t + 1].flatten(2, 3), v[:, None, : t + 1].flatten(2, 3)
            )
            for t in range(frames)
        ]
        hidden = self.to_out[0](torch.cat(seen, dim=1))
        return x + rearrange(hidden, "b t (h w) c -> b c t h w", h=height, w=width)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the smallest resolution."""

    def __init__(self, channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups, ops=ops)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, ops=ops) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Strided causal convolution."""

    def __init__(self, channels: int, stride: tuple[int, int, int], *, ops: ModuleType) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride, ops=ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution; the first frame is one pixel frame and is not doubled in time."""

    def __init__(self, channels: int, factor: tuple[int, int, int], *, ops: ModuleType) -> None:
        super().__init__()
        self.factor = tuple(float(value) for value in factor)
        self.conv = CausalConv3d(channels, channels, ops=ops)

    def forward(self, x: Tensor) -> Tensor:
        first = F.interpolate(x[:, :, 0], scale_factor=self.factor[1:], mode="nearest").unsqueeze(2)
        if x.shape[2] == 1:
            return self.conv(first)
        rest = F.interpolate(x[:, :, 1:].contiguous(), scale_factor=self.factor, mode="nearest")
        return self.conv(torch.cat([first, rest], dim=2))


class DownBlock(nn.Module):
    """Resnets, then a downsampling where `stride` is given."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, groups: int, stride: tuple[int, int, int] | None,
        *, ops: ModuleType,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups, ops=ops) for a, b in pairwise(widths)])
        self.downsamplers = nn.ModuleList([Downsample(out_channels, stride, ops=ops)] if stride else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Resnets, then an upsampling where `factor` is given."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, groups: int, factor: tuple[int, int, int] | None,
        *, ops: ModuleType,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups, ops=ops) for a, b in pairwise(widths)])
        self.upsamplers = nn.ModuleList([Upsample(out_channels, factor, ops=ops)] if factor else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x
