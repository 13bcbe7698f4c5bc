"""The latent spaces of the Nano VAEs: linear codes, fixed before any network is trained.

Training a small VAE end to end on two cores takes hours, most of them spent while encoder and decoder chase
each other. Here the code is decided first: the 16 principal components of 4x8x8-pixel pieces, which a linear
map gives from the drawn clips alone. Encoder and decoder then learn it side by side, each with a fixed target,
and the DiT can train on the exact code at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky5_core.nano.drawing import random_clip

LATENT_CHANNELS = 16


@dataclass(frozen=True)
class LinearCode:
    """Maps between pixel pieces and latents. First frames (1x8x8) and later groups (4x8x8) have their own bases.

    A code of pictures has the first only.
    """

    first_mean: Tensor
    first_basis: Tensor
    """(192, 16), pixels to latents; its pseudo-inverse goes back."""
    rest_mean: Tensor | None = None
    rest_basis: Tensor | None = None
    """(768, 16)."""

    @property
    def error_weights(self) -> Tensor:
        """(16,) what a unit error of each latent channel comes to in pixels, mean 1."""
        basis = self.first_basis if self.rest_basis is None else self.rest_basis
        scale = torch.linalg.pinv(basis).square().sum(1)
        return scale / scale.mean()

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, 16, T, H/8, W/8) of pixels (B, F, H, W, 3) in [0, 1]."""
        first, rest = _pieces(pixels * 2 - 1)
        parts = [(first - self.first_mean) @ self.first_basis]
        if rest.shape[1]:
            parts.append((rest - self.rest_mean) @ self.rest_basis)
        return rearrange(torch.cat(parts, dim=1), "b t h w c -> b c t h w")

    def decode(self, latents: Tensor) -> Tensor:
        """The linear reconstruction, pixels (B, F, H, W, 3)."""
        codes = rearrange(latents, "b c t h w -> b t h w c")
        first = codes[:, :1] @ torch.linalg.pinv(self.first_basis) + self.first_mean
        parts = [rearrange(first, "b t h w (p q c) -> b t (h p) (w q) c", p=8, q=8)]
        if codes.shape[1] > 1:
            rest = codes[:, 1:] @ torch.linalg.pinv(self.rest_basis) + self.rest_mean
            parts.append(rearrange(rest, "b t h w (s p q c) -> b (t s) (h p) (w q) c", s=4, p=8, q=8))
        return (torch.cat(parts, dim=1) + 1) / 2

    def save(self, path: Path) -> None:
        """Write the four tensors as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in vars(self).items() if value is not None}, path)

    @classmethod
    def load(cls, path: Path) -> LinearCode:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def _pieces(pixels: Tensor) -> tuple[Tensor, Tensor]:
    first = rearrange(pixels[:, :1], "b t (h p) (w q) c -> b t h w (p q c)", p=8, q=8)
    rest = rearrange(pixels[:, 1:], "b (t s) (h p) (w q) c -> b t h w (s p q c)", s=4, p=8, q=8)
    return first, rest


def _components(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N,), principal axes (N, count), and the standard deviation along each."""
    mean = data.mean(0)
    covariance = (data - mean).T @ (data - mean) / len(data)
    variances, axes = torch.linalg.eigh(covariance.double())
    order = variances.argsort(descending=True)[:count]
    return mean, axes[:, order].float(), variances[order].float().sqrt()


def fit_linear_code(seed: int, side: int, num_clips: int = 600) -> LinearCode:
    """The code from drawn clips.

    Channels are scaled by std^-1/2: coarse content (colour, place) keeps larger latents than fine edges, so
    that noise reaches edges first, as it does in the latents of natural images.
    """
    rng = random.Random(seed)
    clips = torch.stack([random_clip(rng, 17, (side, side))[1] for _ in range(num_clips)]) * 2 - 1
    first, rest = (part.flatten(0, 3) for part in _pieces(clips))
    first_mean, first_axes, first_std = _components(first, LATENT_CHANNELS)
    rest_mean, rest_axes, rest_std = _components(rest, LATENT_CHANNELS)
    rest_basis = rest_axes / rest_std.sqrt()
    # The first frame's basis spans its own best 16 dimensions, turned within them so that a still picture has
    # nearly the same latents as a first frame and as four later frames.
    wanted = (first.repeat(1, 4) - rest_mean) @ rest_basis
    whitened = (first - first_mean) @ first_axes / first_std
    left, stretch, right = torch.linalg.svd(whitened.T @ wanted / len(first))
    # A direction that still pictures do not need would be squeezed to nothing: give it the size of the edges.
    within = left * stretch.clamp_min(float(rest_std.sqrt().min())) @ right
    first_basis = first_axes / first_std @ within
    code = LinearCode(first_mean, first_basis, rest_mean, rest_basis)
    scale = code.encode((clips + 1) / 2).std()
    return LinearCode(first_mean, first_basis / scale, rest_mean, rest_basis / scale)


def fit_picture_code(seed: int, sizes: Sequence[tuple[int, int]], num_pictures: int = 3000) -> LinearCode:
    """The code of pictures, from drawn ones: principal components of 8x8-pixel pieces, scaled as above."""
    rng = random.Random(seed)
    drawn = [random_clip(rng, 1, sizes[number % len(sizes)])[1][None] * 2 - 1 for number in range(num_pictures)]
    pieces = torch.cat([_pieces(picture)[0].flatten(0, 3) for picture in drawn])
    mean, axes, std = _components(pieces, LATENT_CHANNELS)
    basis = axes / std.sqrt()
    return LinearCode(mean, basis / ((pieces - mean) @ basis).std())
