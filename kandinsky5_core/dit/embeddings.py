"""What enters the CrossDiT: time, text, the pooled caption vector and patches; and what leaves it."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import LAYER_NORM_EPS, Modulation, in_fp32, modulated_norm
from .rope import frequencies


def timestep_features(timestep: Tensor, dim: int) -> Tensor:
    """(B,) in 0..1000 to (B, dim) fp32 sinusoids, cosines first."""
    angles = timestep.float()[:, None] * frequencies(dim, timestep.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbeddings(nn.Module):
    """Sinusoids and a two-layer MLP, all in fp32."""

    def __init__(self, model_dim: int, time_dim: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.in_layer = ops.Linear(model_dim, time_dim)
        self.out_layer = ops.Linear(time_dim, time_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) to (B, time_dim) fp32."""
        return in_fp32(self.out_layer, F.silu(in_fp32(self.in_layer, timestep_features(timestep, self.model_dim))))


class TextEmbeddings(nn.Module):
    """Linear, then an affine layer norm; for the token stream and for the pooled vector alike."""

    def __init__(self, text_dim: int, out_dim: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.in_layer = ops.Linear(text_dim, out_dim)
        self.norm = ops.LayerNorm(out_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_layer(x)
        return self.norm(hidden).to(hidden.dtype)


class VisualEmbeddings(nn.Module):
    """Latents to tokens: patches of 1x2x2 cells, channel innermost, and a linear."""

    def __init__(self, channels: int, model_dim: int, patch_size: tuple[int, int, int], *, ops: ModuleType) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_layer = ops.Linear(channels * patch_size[0] * patch_size[1] * patch_size[2], model_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, t*h*w, D) in row-major token order."""
        pt, ph, pw = self.patch_size
        patches = rearrange(
            latents, "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw
        )  # fmt: skip
        return self.in_layer(patches)


class OutLayer(nn.Module):
    """Modulated norm, a linear, and patches back to cells: channel outermost, unlike on the way in."""

    def __init__(
        self, model_dim: int, time_dim: int, channels: int, patch_size: tuple[int, int, int], *, ops: ModuleType
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = Modulation(time_dim, model_dim, 2, ops=ops)
        self.out_layer = ops.Linear(model_dim, channels * patch_size[0] * patch_size[1] * patch_size[2])

    def forward(self, x: Tensor, time_embed: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, t*h*w, D) to (B, C, T, H, W)."""
        shift, scale = self.modulation(time_embed)
        x = self.out_layer(modulated_norm(x, shift, scale))
        (t, h, w), (pt, ph, pw) = grid, self.patch_size
        return rearrange(
            x, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )  # fmt: skip
