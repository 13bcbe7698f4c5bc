"""Layers of the CrossDiT that blocks are made of.

Shape legend: B batch, S query tokens, L key tokens, D model_dim, N heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.dense import AttentionFn
from .rope import Rope, apply_rope

RMS_EPS = 1.1920929e-07
LAYER_NORM_EPS = 1e-5
CAST_NUMBERS = 2**20
"""Weights that are cast to fp32 at a time on the CPU: 4 MB, which stay in the cache."""
PIECE_NUMBERS_CPU, PIECE_NUMBERS, MATMUL_PIECE = 2**18, 2**24, 2**24
"""Numbers that are computed in fp32 at a time without gradients: on the CPU what stays in the cache, elsewhere enough
to keep a device busy. A long clip's copies in fp32 would be the most that a block holds."""
QUARTERS = 4
"""Pieces of a long clip in the feed-forward, which are no smaller than `MATMUL_PIECE` numbers."""


def in_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` computed in fp32 even where its weights are stored in bf16.

    Factories other than torch.nn (ComfyUI's) cast their weights to the input's dtype themselves.
    """
    x = x.float()
    # Tensors without data, where sizes are counted, know no autocast.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if layer.weight.dtype == torch.float32 or type(layer).forward not in (nn.Linear.forward, nn.RMSNorm.forward):
            return layer(x)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, layer.normalized_shape, layer.weight.float(), layer.eps)
        return _linear_in_fp32(x, layer.weight, layer.bias)


def _linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with weights that are stored in 16 bits; on the CPU without a whole copy of them in memory."""
    if x.device.type != "cpu" or weight.numel() <= CAST_NUMBERS:
        return F.linear(x, weight.float(), None if bias is None else bias.float())
    rows = max(1, CAST_NUMBERS // weight.shape[1])
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.split(rows)
    parts = [_linear_in_fp32(x, some, own) for some, own in zip(weights, biases, strict=True)]
    return torch.cat(parts, dim=-1)


def head_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """RMS norm of each head (B, S, N, d) in fp32, back in x's dtype.

    PyTorch's own on the CPU is made of generic operations and takes about five times as long for the same bits.
    """
    if x.device.type != "cpu" or type(layer).forward is not nn.RMSNorm.forward or torch.compiler.is_compiling():
        return in_fp32(layer, x).to(x.dtype)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + layer.eps)
    return (wide * inverse).mul_(layer.weight.float()).to(x.dtype)


def normed_heads(layer: nn.Module, x: Tensor, rope: Rope | None) -> Tensor:
    """Queries or keys (B, S, N, d) normalised and, where they have a place, rotated; without gradients in place."""
    if rope is None:
        return in_pieces(partial(head_norm, layer), x, x) if takes_pieces() else head_norm(layer, x)

    def compute(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rope(head_norm(layer, part), Rope(cos, sin))

    return in_pieces(compute, x, x, *rope) if takes_pieces() else compute(x, *rope)


def in_pieces(compute: Callable[..., Tensor], out: Tensor, *inputs: Tensor, most: int = 0) -> Tensor:
    """`compute(*inputs)` put into `out`, some tokens at a time; all are (B, S, ..), or (S, ..) what the batch shares.

    Each token is computed on its own, so the pieces change no bit but where a matrix product takes another kernel for
    fewer rows. `out` may be one of the inputs.
    """
    most = most or (PIECE_NUMBERS_CPU if out.device.type == "cpu" else PIECE_NUMBERS)
    rows = max(1, most * out.shape[1] // max(1, out.numel()))
    for start in range(0, out.shape[1], rows):
        parts = [x[start : start + rows] if x.dim() == 2 else x[:, start : start + rows] for x in inputs]
        out[:, start : start + rows].copy_(compute(*parts))
    return out


def takes_pieces() -> bool:
    """Gradients need whole tensors to go back through; a compiler fuses the steps and keeps no copies either."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x)*(1+scale)+shift in fp32, back in x's dtype; x (B, S, D), shift and scale (B, 1, D)."""

    def compute(part: Tensor) -> Tensor:
        normed = F.layer_norm(part.float(), part.shape[-1:], eps=LAYER_NORM_EPS)
        return normed.mul_(1 + scale).add_(shift)

    return in_pieces(compute, torch.empty_like(x), x) if takes_pieces() else compute(x).to(x.dtype)


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate*update in fp32, back in x's dtype; without gradients it mostly lies where `update` did."""

    def compute(part: Tensor, added: Tensor) -> Tensor:
        return (gate * added.float()).add_(part)

    if not takes_pieces():
        return compute(x, update).to(x.dtype)
    return in_pieces(compute, update if update.dtype == x.dtype else torch.empty_like(x), x, update)


class Modulation(nn.Module):
    """SiLU and a linear from the time embedding to `count` vectors of D, in fp32."""

    def __init__(self, time_dim: int, model_dim: int, count: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.count = count
        self.out_layer = ops.Linear(time_dim, count * model_dim)

    def forward(self, time_embed: Tensor) -> tuple[Tensor, ...]:
        """(B, time_dim) to `count` tensors (B, 1, D), fp32."""
        return in_fp32(self.out_layer, F.silu(time_embed.float())).unsqueeze(1).chunk(self.count, dim=-1)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; self-attention where x and context are one."""

    def __init__(self, model_dim: int, head_dim: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.num_heads = model_dim // head_dim
        self.to_query = ops.Linear(model_dim, model_dim)
        self.to_key = ops.Linear(model_dim, model_dim)
        self.to_value = ops.Linear(model_dim, model_dim)
        self.query_norm = ops.RMSNorm(head_dim, eps=RMS_EPS)
        self.key_norm = ops.RMSNorm(head_dim, eps=RMS_EPS)
        self.out_layer = ops.Linear(model_dim, model_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        attention: AttentionFn,
        rope: Rope | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, S, D), context (B, L, D), key_mask (B, L) bool; (B, S, D)."""
        # Heads stay beside each other until attention wants them apart: norm and rotation run over whole rows.
        query, key, value = (
            rearrange(part, "b s (n d) -> b s n d", n=self.num_heads)
            for part in (self.to_query(x), self.to_key(context), self.to_value(context))
        )
        query, key = normed_heads(self.query_norm, query, rope), normed_heads(self.key_norm, key, rope)
        attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), key_mask)
        del query, key, value  # before more is made
        return self.out_layer(rearrange(attended, "b n s d -> b s (n d)"))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear; no biases."""

    def __init__(self, model_dim: int, ff_dim: int, *, ops: ModuleType) -> None:
        super().__init__()
        self.in_layer = ops.Linear(model_dim, ff_dim, bias=False)
        self.out_layer = ops.Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The hidden numbers would be the most that a block holds. In quarters they no longer are, and weights in few
        # bits, which are unpacked for each piece, are so four times at most; those that come from elsewhere come once.
        most = max(MATMUL_PIECE, -(-x.numel() // QUARTERS))
        if takes_pieces() and x.numel() > most and self.is_at_hand(x):
            return in_pieces(self.whole, torch.empty_like(x), x, most=most)
        return self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens at once."""
        hidden = self.in_layer(x)
        hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
        return self.out_layer(hidden)

    def is_at_hand(self, x: Tensor) -> bool:
        """Whether both weights can be used as they lie; ComfyUI may have left them in CPU memory or another dtype."""
        weights = (self.in_layer.weight, self.out_layer.weight)
        return all(weight.device == x.device and weight.dtype == x.dtype for weight in weights)
