"""The HunyuanVideo 3-D causal VAE (video models): 8x8 pixels and 4 frames to one cell of 16 channels.

Attribute names are those of the diffusers checkpoint; the single-file layout is mapped in `weights/keys.py`.
Shapes: pixels (B, 3, F, H, W) in [-1, 1]; latents (B, 16, (F-1)/4+1, H/8, W/8), unscaled.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import VAEConfig
from .layers import NORM_EPS, CausalConv3d, DownBlock, MidBlock, UpBlock


def _strides(config: VAEConfig) -> list[tuple[int, int, int] | None]:
    """What each level but the last halves: space always, time on the innermost levels (the report's 1, 2, 2)."""
    num_halvings = len(config.block_out_channels) - 1
    num_temporal = config.temporal_ratio.bit_length() - 1
    strides: list[tuple[int, int, int] | None] = [
        (2 if level >= num_halvings - num_temporal else 1, 2, 2) for level in range(num_halvings)
    ]
    return [*strides, None]


class Encoder(nn.Module):
    """Pixels to the 2*latent_channels moments before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(3, widths[0], ops=ops)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, stride, ops=ops)
                for i, (width, stride) in enumerate(zip(widths, _strides(config), strict=True))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, ops=ops)
        self.conv_norm_out = ops.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, ops=ops)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents after `post_quant_conv` to pixels."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], ops=ops)
        self.mid_block = MidBlock(widths[0], groups, ops=ops)
        # Upsampling runs the same order as downsampling: space first, space and time on the later levels.
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, factor, ops=ops)
                for i, (width, factor) in enumerate(zip(widths, _strides(config), strict=True))
            ]
        )
        self.conv_norm_out = ops.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 3, ops=ops)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class HunyuanVAE(nn.Module):
    """The whole autoencoder, untiled; `vae/tiling.py` cuts what does not fit."""

    def __init__(self, config: VAEConfig, *, ops: ModuleType = nn) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops=ops)
        self.decoder = Decoder(config, ops=ops)
        self.quant_conv = ops.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = ops.Conv3d(config.latent_channels, config.latent_channels, 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each (B, 16, T, h, w), of pixels (B, 3, F, H, W) in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Unscaled latents (B, 16, T, h, w): the posterior mean, or a sample of it when given a generator."""
        mean, logvar = self.moments(pixels)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return mean + torch.exp(0.5 * logvar) * noise.to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W), about [-1, 1] and not clamped, of unscaled latents (B, 16, T, h, w)."""
        return self.decoder(self.post_quant_conv(latents))
