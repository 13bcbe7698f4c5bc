"""Sampling that starts from given latents, or leaves parts of them alone.

Flow matching runs on straight lines: a clean latent seen at noise level sigma is (1-sigma)*clean + sigma*noise, and
its velocity is noise - clean. So a part that must not change needs no copying between steps: it is given that
velocity, and every sampler carries it exactly back to where it came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .samplers import VelocityFn
from .schedule import shifted


@dataclass(frozen=True, kw_only=True)
class PartialNoise:
    """Clean latents to start from, and how far each place may move away from them."""

    clean: Tensor
    """(B, C, T, H, W), scaled for the DiT."""
    strength: Tensor | None = None
    """(1, 1, T, H, W) in [0, 1]: 0 stays, 1 is made anew, between them changes as much as `denoise` of that value
    would change it (differential strength). None: everything may change."""

    def start(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents at the noise level where sampling begins."""
        return (1 - sigma) * self.clean + sigma * noise

    def restrict(self, velocity_fn: VelocityFn, noise: Tensor, shift: float) -> VelocityFn:
        """`velocity_fn`, but straight back to the clean latents wherever a place may not change yet.

        Args:
            noise: What `start` was given.
            shift: Of the schedule: a place of strength s changes from the level at which `denoise` s would begin.
        """
        if self.strength is None:
            return velocity_fn
        level = shifted(self.strength, shift).to(noise)
        straight = noise - self.clean

        def restricted(latents: Tensor, sigma: Tensor) -> Tensor:
            # A hair's breadth of tolerance: the schedule and the mask come to the same number on different ways.
            moves = (sigma <= level + 1e-6) & (level > 0)
            return torch.where(moves, velocity_fn(latents, sigma), straight)

        return restricted
