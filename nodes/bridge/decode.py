"""Decoding within the core's memory budget where the VAE is ours, with ComfyUI's otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .vae import K5VAE, check_kind


def decode_latent(samples: Tensor, vae: Any, budget_bytes: int) -> Tensor:
    """Unscaled latents to frames (B, F, H, W, 3) in [0, 1].

    Raises:
        ValueError: the latents have more than one frame and the VAE is for pictures.
    """
    check_kind(vae, samples)
    if isinstance(vae, K5VAE):
        return vae.decode_within(samples if samples.ndim == 5 else samples.unsqueeze(2), budget_bytes)
    frames = vae.decode(samples)
    return frames if frames.ndim == 5 else frames.unsqueeze(1)
