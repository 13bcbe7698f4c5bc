"""The FLUX.1 VAE (image models): 8x8 pixels to one cell of 16 channels, every frame on its own.

Attribute names are those of the diffusers checkpoint; BFL's `ae.safetensors` is mapped in `weights/keys.py`.
Shapes: pixels (B, 3, T, H, W) in [-1, 1]; latents (B, 16, T, H/8, W/8), unscaled. Frames are folded into the
batch inside, so that callers treat both VAEs alike; the layers below see (N, C, H, W).
"""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig
from .latents import sample_posterior

NORM_EPS = 1e-6


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.norm1 = ops.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = ops.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ops.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = ops.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = ops.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """One head over all pixels of an image."""

    def __init__(self, channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.group_norm = ops.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = ops.Linear(channels, channels)
        self.to_k = ops.Linear(channels, channels)
        self.to_v = ops.Linear(channels, channels)
        self.to_out = nn.ModuleList([ops.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        hidden = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        hidden = F.scaled_dot_product_attention(self.to_q(hidden), self.to_k(hidden), self.to_v(hidden))
        return x + rearrange(self.to_out[0](hidden), "n 1 (h w) c -> n c h w", h=height, w=width)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the smallest resolution."""

    def __init__(self, channels: int, groups: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups, ops=ops)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, ops=ops) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Strided convolution, padded on the right and below only."""

    def __init__(self, channels: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _resnets(in_channels: int, out_channels: int, num_layers: int, groups: int, *, ops: ModuleType) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * num_layers
    return nn.ModuleList([ResnetBlock(a, b, groups, ops=ops) for a, b in itertools.pairwise(widths)])


class DownBlock(nn.Module):
    """Resnets, then a downsampling on every level but the last."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, groups: int, *, last: bool, ops: ModuleType
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups, ops=ops)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels, ops=ops)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Resnets, then an upsampling on every level but the last."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, groups: int, *, last: bool, ops: ModuleType
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups, ops=ops)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels, ops=ops)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (N, 3, H, W) to the 2*latent_channels moments."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = ops.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(
                    widths[max(i - 1, 0)], width, config.layers_per_block, groups, last=i == len(widths) - 1, ops=ops
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, ops=ops)
        self.conv_norm_out = ops.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = ops.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (N, latent_channels, h, w) to images."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = ops.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, ops=ops)
        num_layers = config.layers_per_block + 1
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(widths[max(i - 1, 0)], width, num_layers, groups, last=i == len(widths) - 1, ops=ops)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = ops.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = ops.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FluxVAE(nn.Module):
    """The whole autoencoder, untiled; `vae/tiling.py` cuts what does not fit."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType = nn) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops=ops)
        self.decoder = Decoder(config, ops=ops)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each (B, 16, T, h, w), of pixels (B, 3, T, H, W) in [-1, 1]."""
        moments = self.encoder(rearrange(pixels, "b c t h w -> (b t) c h w"))
        mean, logvar = rearrange(moments, "(b t) c h w -> b c t h w", b=pixels.shape[0]).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Unscaled latents (B, 16, T, h, w): the posterior mean, or a sample of it when given a generator."""
        mean, logvar = self.moments(pixels)
        return mean if generator is None else sample_posterior(mean, logvar, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W), about [-1, 1] and not clamped, of unscaled latents (B, 16, T, h, w)."""
        images = self.decoder(rearrange(latents, "b c t h w -> (b t) c h w"))
        return rearrange(images, "(b t) c h w -> b c t h w", b=latents.shape[0])
