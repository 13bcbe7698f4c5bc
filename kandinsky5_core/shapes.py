"""Sizes: pixels, latents and tokens, and the arithmetic between them, once.

Units: frames and pixels on the video side; latent frames and cells (8 pixels for the released VAEs) on the
latent side; tokens are 1x2x2 latent cells.
"""

from __future__ import annotations

from typing import NamedTuple

from .config import VAEConfig


class LatentShape(NamedTuple):
    """Shape of latents, (B, C, T, H, W)."""

    batch: int
    channels: int
    frames: int
    height: int
    width: int

    def token_grid(self, patch_size: tuple[int, int, int] = (1, 2, 2)) -> tuple[int, int, int]:
        """Tokens along (t, h, w)."""
        return self.frames // patch_size[0], self.height // patch_size[1], self.width // patch_size[2]


class VideoShape(NamedTuple):
    """Shape of a clip in pixels; an image is a clip of one frame."""

    batch: int
    frames: int
    height: int
    width: int

    def check(self, vae: VAEConfig) -> None:
        """Refuse sizes the models cannot take.

        Raises:
            ValueError: names the input, its value and the nearest sizes that work.
        """
        multiple = 2 * vae.spatial_ratio
        for name, value in (("width", self.width), ("height", self.height)):
            if value < multiple or value % multiple:
                lower = max(multiple, value // multiple * multiple)
                raise ValueError(
                    f"{name} {value} is not a positive multiple of {multiple}; use {lower} or {lower + multiple}"
                )
        if self.frames < 1 or (self.frames - 1) % vae.temporal_ratio:
            lower = max(1, (self.frames - 1) // vae.temporal_ratio * vae.temporal_ratio + 1)
            raise ValueError(
                f"frames {self.frames} is not of the form {vae.temporal_ratio}k+1; "
                f"use {lower} or {lower + vae.temporal_ratio}"
            )
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")

    def latent_shape(self, vae: VAEConfig) -> LatentShape:
        """The latents this clip becomes: (B, C, (F-1)/4+1, H/8, W/8) for the released video VAE."""
        self.check(vae)
        return LatentShape(
            self.batch,
            vae.latent_channels,
            (self.frames - 1) // vae.temporal_ratio + 1,
            self.height // vae.spatial_ratio,
            self.width // vae.spatial_ratio,
        )

    @classmethod
    def from_latent(cls, latent: LatentShape, vae: VAEConfig) -> VideoShape:
        """The clip that latents of this shape decode to."""
        return cls(
            latent.batch,
            (latent.frames - 1) * vae.temporal_ratio + 1,
            latent.height * vae.spatial_ratio,
            latent.width * vae.spatial_ratio,
        )


def size_from_image(height: int, width: int, *, max_area: int, multiple: int) -> tuple[int, int]:
    """(height, width) of a clip made from an image: its aspect at `max_area` pixels, in whole `multiple`s.

    The official rule (facts sheet 1.3): k = sqrt(max_area / (h*w)) / multiple, each side round(side*k)*multiple;
    small images are scaled up too.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image size {width}x{height} is empty")
    factor = (max_area / (height * width)) ** 0.5 / multiple
    return max(1, round(height * factor)) * multiple, max(1, round(width * factor)) * multiple


def nearest_resolution(height: int, width: int, resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) of `resolutions` whose ratio is nearest to that of an image."""
    return min(resolutions, key=lambda size: abs(size[0] / size[1] - height / width))
