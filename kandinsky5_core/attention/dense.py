"""Dense attention behind one signature; other engines for it are in `attention.engines`.

Shape legend: B batch, N queries, M keys, d head_dim; engines take and give (B, heads, tokens, d).
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class AttentionFn(Protocol):
    """softmax(q k^T / sqrt(d)) v."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q (B, heads, N, d), k and v (B, heads, M, d), key_mask (B, M) bool, True = keep; (B, heads, N, d)."""
        ...


def dense_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's own scaled dot-product attention; shapes as `AttentionFn`. Every row needs one key to keep."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
