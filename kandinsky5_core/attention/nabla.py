"""NABLA, neighbourhood-adaptive block-level attention (report section 5.4): the plan of one generation.

Shape legend: B batch, S = 64*n tokens in block order, n token blocks, d head_dim.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from ..config import NablaConfig
from .block_mask import mass_mask, window_mask
from .flex import compiled_flex_attention, flex_limit, probe_flex
from .gather import gathered_attention
from .token_blocks import token_blocks

logger = logging.getLogger(__name__)

PathChoice = Literal["auto", "flex", "gather"]
DEFAULT_NABLA = NablaConfig(mass=0.9)
"""For variants trained with dense attention whose user asks for NABLA: the mildest setting a checkpoint has."""


class NablaAttention:
    """An `AttentionFn` over tokens in block order; made once for a token grid, used in every visual block.

    The block mask is made anew from the queries and keys of every call, for each head of each clip.
    """

    def __init__(
        self, config: NablaConfig, grid: tuple[int, int, int], *, device: torch.device | str = "cpu",
        path: PathChoice = "auto",
    ) -> None:  # fmt: skip
        """
        Args:
            config: Mass and window.
            grid: Tokens along (t, h, w); h and w are padded to whole token blocks of 8x8.
            device: Where the tokens will be.
            path: 'flex' (compiled FlexAttention), 'gather' (exact, needs no compiler), or 'auto': flex where it
                works, else gather. Decided at the first call, once with and once without gradients, and logged.

        Raises:
            ValueError: the grid is empty or the path unknown.
        """
        if path not in ("auto", "flex", "gather"):
            raise ValueError(f"NABLA path must be 'auto', 'flex' or 'gather', got '{path}'")
        self.config = config
        self.path = path
        self.tokens = token_blocks(grid, device)
        self.window = window_mask(self.tokens.blocks, config.window, device)
        self._use_flex: dict[bool, bool] = {}
        self.told = "nabla (not used yet)"
        """The path of the last call and why, for the output."""

    @property
    def token_mask(self) -> Tensor | None:
        """(S,) bool, True for real tokens; None where nothing is padded."""
        return self.tokens.token_mask

    def reorder(self, x: Tensor, dim: int = 1) -> Tensor:
        """Row-major tokens to block order along `dim`, padded: (B, t*h*w, D) to (B, S, D)."""
        return self.tokens.reorder(x, dim)

    def restore(self, x: Tensor, dim: int = 1) -> Tensor:
        """The inverse of `reorder`, cropped: (B, S, D) to (B, t*h*w, D)."""
        return self.tokens.restore(x, dim)

    def block_mask(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, heads, n, n) bool: the blocks that hold the mass, and the window."""
        return mass_mask(q, k, self.config.mass, self.token_mask).logical_or_(self.window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Sparse self-attention of (B, heads, S, d) in block order; the same shape.

        Raises:
            ValueError: a key mask is given, the token count is not that of the grid, or path 'flex' cannot work.
        """
        if key_mask is not None:
            raise ValueError("NABLA takes no key_mask: it knows its padding itself; use dense attention for text")
        if q.shape[2] != len(self.tokens.order) or k.shape != q.shape:
            raise ValueError(
                f"NABLA for token grid {self.tokens.grid} takes {len(self.tokens.order)} tokens in block order, "
                f"got queries {tuple(q.shape)} and keys {tuple(k.shape)}; call reorder() first"
            )
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if wants_grad not in self._use_flex:
            self._use_flex[wants_grad] = self._choose_flex(q, wants_grad)
        attend = compiled_flex_attention if self._use_flex[wants_grad] else gathered_attention
        return attend(q, k, v, self.block_mask(q, k), self.token_mask)

    def _choose_flex(self, q: Tensor, wants_grad: bool) -> bool:
        """Decide the path and say so: what is asked for, or flex where it can work."""
        use = f"NABLA {'with' if wants_grad else 'without'} gradients on {q.device.type}"
        if self.path == "gather":
            logger.info("%s: gathered token blocks, as asked", use)
            self.told = "nabla: gathered token blocks (as asked)"
            return False
        padded = self.token_mask is not None
        limit = flex_limit(q.device, padded=padded, wants_grad=wants_grad)
        problem = limit or probe_flex(q, padded=padded, wants_grad=wants_grad)
        self.told = "nabla: compiled FlexAttention" if problem is None else f"nabla: gathered token blocks ({problem})"
        if problem is None:
            logger.info("%s: compiled FlexAttention", use)
        elif self.path == "flex":
            raise ValueError(f"NABLA path 'flex' cannot be used: {problem}; use path 'auto' or 'gather'")
        elif limit:
            logger.info("%s: gathered token blocks, exact (%s)", use, problem)
        else:
            logger.warning(
                "%s: gathered token blocks, exact but often slower than compiled FlexAttention, which does not work "
                "here (%s)", use, problem,
            )  # fmt: skip
        return problem is None


def resolve_attention(choice: str, trained_with: NablaConfig | None) -> NablaConfig | None:
    """The attention to run: a NABLA setting, or None for dense.

    Args:
        choice: 'auto' (what the variant was trained with), 'dense' or 'nabla'.
        trained_with: The `nabla` of the variant; None where it was trained with dense attention.

    Raises:
        ValueError: `choice` is none of the three.
    """
    if choice not in ("auto", "dense", "nabla"):
        raise ValueError(f"attention must be 'auto', 'dense' or 'nabla', got '{choice}'")
    if choice == "dense":
        return None
    if choice == "nabla" and trained_with is None:
        logger.info(
            "attention 'nabla' for a model trained with dense attention: mass %s, window %s",
            DEFAULT_NABLA.mass, DEFAULT_NABLA.window,
        )  # fmt: skip
        return DEFAULT_NABLA
    return trained_with
