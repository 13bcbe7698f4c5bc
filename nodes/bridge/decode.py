"""Decoding with the core's tiles where the VAE is ours, with ComfyUI's otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .vae import K5VAE


def decode_latent(samples: Tensor, vae: Any, budget_bytes: int) -> Tensor:
    """Unscaled latents to frames (B, F, H, W, 3) in [0, 1].

    Raises:
        ValueError: the latents have more than one frame and the VAE is for pictures.
    """
    if vae.latent_dim == 2 and samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError("vae is for pictures and the latent is a clip; load the HunyuanVideo VAE (hunyuan_video_vae)")
    if vae.latent_dim == 3 and samples.ndim == 4:
        raise ValueError("vae is for video and the latent is a picture; load the FLUX VAE (ae)")
    if isinstance(vae, K5VAE):
        return vae.decode_within(samples if samples.ndim == 5 else samples.unsqueeze(2), budget_bytes)
    frames = vae.decode(samples)
    return frames if frames.ndim == 5 else frames.unsqueeze(1)
