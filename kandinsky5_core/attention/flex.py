"""Attention through PyTorch's compiled FlexAttention, block-sparse and dense, and what finds out if it works.

Shape legend: B batch, S = 64*n tokens in block order, n token blocks, d head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..config import BLOCK_TOKENS
from .block_mask import kept_blocks
from .gather import gathered_attention


@cache
def _compiled_flex(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention compiled for any size.

    Kept for the life of the process: a compiled function is code, not state, and compiling takes seconds to
    minutes. `fullgraph` matters: without it PyTorch may fall back to eager FlexAttention, which on CPU ignores
    the block mask without a word.
    """
    from torch.nn.attention.flex_attention import flex_attention

    # On CUDA only autotuning finds a kernel whose own tiles fit 64-token blocks.
    mode = "max-autotune-no-cudagraphs" if device_type == "cuda" else None
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, mode=mode)


def compiled_flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Attention of each query block to its kept key blocks; arguments and result as `gathered_attention`.

    Raises:
        Exception: whatever the compiler raises where it cannot work; ask `flex_limit` and `probe_flex` first.
    """
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _compiled_flex(q.device.type)(q, k, v, block_mask=flex_mask(mask, token_mask, wants_grad))


@cache
def _compiled_dense() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention without a mask, compiled for any number of tokens; kept as `_compiled_flex` is.

    It needs no autotuning: with nothing to skip, PyTorch's first choice of tiles fits.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A function of its own: PyTorch limits the versions compiled of one function, and NABLA's are not these.
        return flex_attention(q, k, v)

    return torch.compile(attend, dynamic=True, fullgraph=True)


def compiled_dense_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention, q (B, heads, N, d), k and v (B, heads, M, d); (B, heads, N, d).

    Compiled anew for another head size, dtype, batch or number of heads.

    Raises:
        Exception: whatever the compiler raises where it cannot work, such as on CPU with gradients.
    """
    return _compiled_dense()(q, k, v)


def flex_limit(device: torch.device, *, padded: bool, wants_grad: bool) -> str | None:
    """Why FlexAttention cannot be used whatever compiler there is, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"PyTorch compiles FlexAttention for cuda and cpu, not for {device.type}"
    if device.type == "cpu" and wants_grad:
        return "FlexAttention has no backward pass on CPU"
    if device.type == "cpu" and padded:
        # Its code generator confuses the length of a captured mask with a tile size (seen in PyTorch 2.13).
        return "FlexAttention on CPU does not compile reliably with padded tokens"
    return None


def probe_flex(q: Tensor, *, padded: bool, wants_grad: bool) -> str | None:
    """Why compiled FlexAttention does not work here, or None: three small blocks are computed and compared.

    Args:
        q: Queries as in the real call; batch, heads, head_dim, dtype and device are taken from them.
    """
    try:
        with torch.set_grad_enabled(wants_grad):
            error = _probe_error(q, padded, wants_grad)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # Compilers and their drivers fail with every kind of exception.
        lines = str(problem).strip().splitlines() or ["no message"]
        return f"{type(problem).__name__}: {lines[0]}"
    return None if error < 0.1 else f"its result is wrong by {error:.2g}, as when the block mask is ignored"


def _probe_error(q: Tensor, padded: bool, wants_grad: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    shape = (*q.shape[:2], 3 * BLOCK_TOKENS, q.shape[-1])
    q, k, v = (torch.randn(shape, generator=generator).to(q).requires_grad_(wants_grad) for _ in range(3))
    block_id = torch.arange(3, device=q.device).repeat_interleave(BLOCK_TOKENS)
    mask = torch.eye(3, dtype=torch.bool, device=q.device).expand(*shape[:2], 3, 3)
    token_mask = torch.arange(shape[2], device=q.device) % BLOCK_TOKENS < 40 if padded else None
    # With values near 0, 1 and 2, a block that should not be seen moves the result by far more than rounding.
    far_apart = v * 0.01 + block_id[:, None].to(v)
    out = compiled_flex_attention(q, k, far_apart, mask, token_mask)
    if wants_grad:
        torch.autograd.grad(out.float().sum(), (q, k, v))
    expected = gathered_attention(q, k, far_apart, mask, token_mask)
    return float((out - expected).abs().max())


def flex_mask(mask: Tensor, token_mask: Tensor | None = None, wants_grad: bool = False) -> Any:
    """FlexAttention's `BlockMask` of a mask (B, heads, n, n), True for blocks to look at."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = kept_blocks(mask)
    options = _block_mask_options(wants_grad)
    if mask.device.type == "cuda" and token_mask is None:
        # Full blocks: the kernel asks no mask_mod about single tokens.
        none = torch.zeros_like(counts)
        return BlockMask.from_kv_blocks(none, indices, counts, indices, BLOCK_SIZE=BLOCK_TOKENS, **options)
    # On CPU the kernel cannot be built from full blocks alone.
    keep = _keep_all if token_mask is None else _keep_real(token_mask)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK_TOKENS, mask_mod=keep, **options)


@cache
def _block_mask_options(wants_grad: bool) -> dict[str, bool]:
    """Only the backward pass needs the transposed lists; older PyTorch cannot be told to leave them out."""
    from torch.nn.attention.flex_attention import BlockMask

    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": wants_grad} if "compute_q_blocks" in known else {}


def _keep_all(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
    return key >= 0


def _keep_real(token_mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def keep(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return token_mask[key]

    return keep
