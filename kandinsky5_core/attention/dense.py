"""Dense attention behind one signature, and the engines that can compute it.

Shape legend: B batch, N queries, M keys, d head_dim; engines take and give (B, heads, tokens, d).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
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


class Engine(NamedTuple):
    """One way to compute dense attention."""

    module: str
    """What must be installed."""
    build: Callable[[], AttentionFn]
    """Imports it; called once, when the engine is chosen."""


def _build_flash2() -> AttentionFn:
    from flash_attn import flash_attn_func

    return _with_masks_dense(lambda q, k, v: _tokens_first(flash_attn_func, q, k, v))


def _build_flash3() -> AttentionFn:
    from flash_attn_interface import flash_attn_func

    return _with_masks_dense(lambda q, k, v: _tokens_first(flash_attn_func, q, k, v))


def _tokens_first(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn wants (B, tokens, heads, d); some of its releases also return the log-sum-exp."""
    out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _build_sage() -> AttentionFn:
    from sageattention import sageattn

    return _with_masks_dense(lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False))


def _with_masks_dense(unmasked: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AttentionFn:
    """These engines know no key masks: the short, masked text attention stays with PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return unmasked(q, k, v) if key_mask is None else dense_attention(q, k, v, key_mask)

    return attend


ENGINES: dict[str, Engine] = {
    "sdpa": Engine("torch", lambda: dense_attention),
    "flash2": Engine("flash_attn", _build_flash2),
    "flash3": Engine("flash_attn_interface", _build_flash3),
    "sage": Engine("sageattention", _build_sage),
}
"""By name. All but 'sdpa' need CUDA and 16-bit queries; 'sage' quantises and so changes results a little."""


def available_engines(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the engines that are installed and run on `device`; 'sdpa' always."""
    if torch.device(device).type != "cuda":
        return ("sdpa",)
    return tuple(name for name, engine in ENGINES.items() if importlib.util.find_spec(engine.module) is not None)


def attention_engine(name: str, device: torch.device | str = "cpu") -> AttentionFn:
    """The engine called `name`, ready to call.

    Raises:
        ValueError: it is unknown, not installed, or does not run on `device`.
    """
    usable = available_engines(device)
    if name not in usable:
        problem = "not installed, or not for this device" if name in ENGINES else "unknown"
        raise ValueError(f"attention engine '{name}' is {problem}; on {device} there are: {', '.join(usable)}")
    return ENGINES[name].build()
