"""NABLA's attention, its block mask included, beside dense attention over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.block_mask import mass_mask
from ..attention.nabla import NablaAttention
from ..config import BLOCK_TOKENS, NablaConfig
from .sparsity import check_sparsity
from .work import attention_flops

if TYPE_CHECKING:
    from .stages import Case, Plan

ROW_SIDE = 32
"""Tokens along h and w of the clips that are measured."""
WINDOW = (1, 1, 1)
"""Small, so that the sparsity asked for can be met by the mass alone at every length."""
SPREAD = 1.2
"""How far apart the directions of blocks are: the pooled map has logits of about this squared."""
BISECTIONS = 12


def nabla_cases(plan: Plan, case: Callable[..., Case]) -> Iterator[Case]:
    """For each length: NABLA at the mass that drops the share of blocks asked for.

    Raises:
        ValueError: a length that is not whole rows of the clip, or a sparsity that blocks cannot have.
    """
    check_sparsity(plan.sparsity)
    for tokens in plan.attention_tokens:
        grid = token_grid(tokens)
        heads, dim = plan.attention_heads, plan.config.head_dim
        q, k, v = (part.to(plan.device, plan.dtype) for part in block_tokens(heads, tokens, dim))
        mass = mass_for(q, k, plan.sparsity)
        nabla = NablaAttention(NablaConfig(mass=mass, window=WINDOW), grid, device=plan.device)
        kept = float(nabla.block_mask(q, k).float().mean())
        nabla(q, k, v)  # decides its path
        yield case(
            stage="attention", what=f"{tokens} tokens", run=_bound(nabla, q, k, v),
            beside={f"dense {plan.engine.name}": _bound(plan.engine.attend, q, k, v)}, same_output=False,
            tokens=tokens, note=f"{heads} heads of {dim}, mask included",
            facts={"sparsity": 1 - kept, "mass": mass, "window": list(WINDOW), "path": nabla.told, "error":
                   selection_error(nabla, q, k, v), "dense_flops": attention_flops(tokens, heads, dim)},
        )  # fmt: skip


def _bound(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: attend(q, k, v)


def token_grid(tokens: int) -> tuple[int, int, int]:
    """A clip of so many tokens.

    Raises:
        ValueError: it is not whole frames of 32x32.
    """
    if tokens < 1 or tokens % ROW_SIDE**2:
        near = max(1, round(tokens / ROW_SIDE**2)) * ROW_SIDE**2
        raise ValueError(f"--tokens {tokens} is not a multiple of {ROW_SIDE**2}; use {near}")
    return tokens // ROW_SIDE**2, ROW_SIDE, ROW_SIDE


def block_tokens(heads: int, tokens: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v (1, heads, tokens, dim) whose blocks have directions of their own, as those of clips have."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=generator)
    directions = SPREAD * torch.randn(2, 1, heads, tokens // BLOCK_TOKENS, dim, generator=generator)
    q_blocks, k_blocks = directions.repeat_interleave(BLOCK_TOKENS, dim=-2)
    return q + q_blocks, k + k_blocks, v


def mass_for(q: Tensor, k: Tensor, sparsity: float) -> float:
    """The mass at which this share of blocks is dropped, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        dropped = 1 - float(mass_mask(q, k, middle).float().mean())
        low, high = (middle, high) if dropped > sparsity else (low, middle)
    return (low + high) / 2


def selection_error(nabla: NablaAttention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative difference to dense attention over the kept blocks alone, on the first head and 64 queries a time."""
    found = nabla(q, k, v)[:, :1, :BLOCK_TOKENS].float()
    keep = nabla.block_mask(q, k)[:, :1, :1].repeat_interleave(BLOCK_TOKENS, dim=-1)
    scores = (q[:, :1, :BLOCK_TOKENS].float() @ k[:, :1].float().mT) * q.shape[-1] ** -0.5
    expected = scores.masked_fill(~keep, -torch.inf).softmax(dim=-1) @ v[:, :1].float()
    return float((found - expected).norm() / expected.norm())
