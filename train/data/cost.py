"""What material costs in time and disk, from the sizes of networks that are never loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky5_core.config import VAEConfig, Variant
from kandinsky5_core.shapes import VideoShape
from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE

from ..config import DataConfig

if TYPE_CHECKING:
    from .scan import Item

LATENT_BYTES = 2
TEXT_BYTES = 2
CHARACTERS_PER_TOKEN = 4.0
PIXELS_PER_TOKEN = 56
"""Side of what Qwen sees as one token in a picture to edit, which it is shown at half size."""
EFFICIENCY = 0.35
"""Share of the machine's matmul rate that encoding is taken to reach."""
PROBE = 1024


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of encoding everything once."""

    num_frames: int
    """Pixel frames to encode."""
    latent_bytes: int
    """Exact, without the few bytes that a file adds to each sample."""
    text_bytes: int
    """About: four characters a token."""
    encode_flops: float
    seconds: float
    """Rough: by the matmul rate measured here just now."""

    def text(self) -> str:
        """For people."""
        minutes = self.seconds / 60
        took = f"{minutes:.0f} minutes" if minutes >= 2 else f"{self.seconds:.0f} seconds"
        return (
            f"to encode: {self.num_frames} frames, very roughly {took} on this machine; cache: "
            f"{self.latent_bytes / 1e6:.1f} MB of latents and about {self.text_bytes / 1e6:.1f} MB of text"
        )

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(vars(self))


def estimate(items: Sequence[Item], data: DataConfig, variant: Variant) -> Cost:
    """What caching the samples takes."""
    num_frames = sum(_num_frames(item) for item in items)
    pixels = sum(item.bucket.height * item.bucket.width * _num_frames(item) for item in items)
    flops = pixels * encode_flops_per_pixel(variant.vae)
    return Cost(
        num_frames=num_frames, latent_bytes=latent_bytes(items, variant),
        text_bytes=text_bytes(items, variant) if data.cache_text else 0, encode_flops=flops,
        seconds=round(flops / (EFFICIENCY * matmul_rate()), 1) if items else 0.0,
    )  # fmt: skip


def latent_bytes(items: Iterable[Item], variant: Variant) -> int:
    """Of all latents as they are stored."""
    total = 0
    for item in items:
        height, width, num_frames = item.bucket
        shape = VideoShape(1, num_frames, height, width).latent_shape(variant.vae)
        total += LATENT_BYTES * shape.channels * shape.height * shape.width * (shape.frames + _is_more(item))
    return total


def _num_frames(item: Item) -> int:
    """Pixel frames to encode."""
    return item.bucket.num_frames + _is_more(item)


def _is_more(item: Item) -> bool:
    """One frame beside the sample's own: the first of a clip once more, or the picture before an edit."""
    return item.example.kind in ("clip", "edit")


def text_bytes(items: Iterable[Item], variant: Variant) -> int:
    """About: of all captions' embeddings; an edit's also hold its picture, once with and once without the caption."""
    tokens = 0.0
    for item in items:
        words = min(variant.max_text_tokens, 1 + len(item.caption) / CHARACTERS_PER_TOKEN)
        seen = math.prod(side / PIXELS_PER_TOKEN for side in item.bucket[:2]) if item.example.kind == "edit" else 0.0
        tokens += words + 2 * seen
    return round(tokens * variant.dit.in_text_dim * TEXT_BYTES)


def encode_flops_per_pixel(config: VAEConfig) -> float:
    """Floating-point operations of the encoder for each pixel of each frame, counted on the meta device."""
    size, num_frames = 8 * config.spatial_ratio, 1 if config.temporal_ratio == 1 else 4 * config.temporal_ratio + 1
    with torch.device("meta"):
        vae = (FluxVAE if config.kind == "flux" else HunyuanVAE)(config)
        pixels = torch.empty(1, 3, num_frames, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(pixels)
    return counter.get_total_flops() / (num_frames * size * size)


def matmul_rate(device: str = "") -> float:
    """Operations a second of a matrix product here, measured in a few hundredths of a second."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.ones(PROBE, PROBE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * PROBE**3 / best
