"""First-frame normalisation of image-to-video latents (facts: the official post-processing).

Holding the first frame clean leaves the first latent frames a little off in contrast and brightness against the
rest of the clip; their statistics are pulled towards those of the following frames, within narrow limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_NORMALISED = 4
"""Latent frames that are changed: the given one and the three after it."""
NUM_REFERENCE = 5
"""Latent frames after those that they are compared with."""
MEAN_LIMITS = (-0.05, 0.10)
STD_LIMITS = (-0.10, 0.25)
"""How far a frame's mean and standard deviation may move."""


def normalise_first_frames(latents: Tensor) -> Tensor:
    """(B, C, T, H, W) with the first four latent frames normalised; unchanged where there is no frame after them."""
    reference = latents[:, :, NUM_NORMALISED : NUM_NORMALISED + NUM_REFERENCE]
    if reference.shape[2] == 0:
        return latents
    first = latents[:, :, :NUM_NORMALISED]
    mean, std = _statistics(first, dims=(1, 3, 4))
    reference_mean, reference_std = _statistics(reference, dims=(1, 2, 3, 4))
    new_mean = reference_mean.clamp(mean + MEAN_LIMITS[0], mean + MEAN_LIMITS[1])
    new_std = reference_std.clamp(std + STD_LIMITS[0], std + STD_LIMITS[1])
    return torch.cat([(first - mean) / std * new_std + new_mean, latents[:, :, NUM_NORMALISED:]], dim=2)


def _statistics(latents: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over `dims`, kept as dimensions of one."""
    return latents.mean(dims, keepdim=True), latents.std(dims, keepdim=True)
