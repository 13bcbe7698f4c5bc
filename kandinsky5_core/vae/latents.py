"""Between what a VAE gives, what the DiT sees and what people see: scale, sampling, value range."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..config import VAEConfig


def scale_latents(latents: Tensor, config: VAEConfig) -> Tensor:
    """VAE latents as the DiT takes them, same shape. Kandinsky 5 has no shift, with the FLUX VAE neither."""
    return latents * config.scaling_factor


def unscale_latents(latents: Tensor, config: VAEConfig) -> Tensor:
    """The DiT's latents as the VAE decodes them, same shape; undoes `scale_latents`."""
    return latents / config.scaling_factor


def sample_posterior(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from the VAE's diagonal Gaussian, shape, dtype and device of `mean`.

    The noise is made in fp32 on the generator's device, so one seed gives one draw whatever `mean` lies on.
    """
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return mean + torch.exp(0.5 * logvar) * noise.to(mean)


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """VAE pixels (B, 3, F, H, W) in [-1, 1] as frames (B, F, H, W, 3) in [0, 1], fp32, clamped."""
    return rearrange((pixels.float() + 1) / 2, "b c f h w -> b f h w c").clamp(0, 1)


def frames_to_pixels(frames: Tensor) -> Tensor:
    """Frames (B, F, H, W, 3) in [0, 1] as VAE pixels (B, 3, F, H, W) in [-1, 1], same dtype."""
    return rearrange(frames * 2 - 1, "b f h w c -> b c f h w")
