"""Compilation and gradient checkpointing, applied to a DiT from outside: no model file knows of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention.dense import AttentionFn, dense_attention
from ..dit.model import DiffusionTransformer
from ..dit.rope import Rope


def checkpoint_blocks(dit: DiffusionTransformer) -> None:
    """Recompute every block in the backward pass instead of keeping its activations; results stay equal."""
    for block in (*dit.text_transformer_blocks, *dit.visual_transformer_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(dit: DiffusionTransformer, *, dynamic: bool | None = True, backend: str = "inductor") -> None:
    """torch.compile each visual block in place: the blocks share one graph, so it is compiled once.

    Keys of the state dict do not change. LoRA may be merged, or hooked on before the first run. Results differ by
    rounding: a compiler joins operations.

    Args:
        dynamic: True compiles once for every size; None (torch's own choice) again at the second size; False for
            each size anew, which is a little faster where there is only one.
        backend: Of torch.compile.
    """
    outside = torch.compiler.disable(_call)
    for block in dit.visual_transformer_blocks:
        block.forward = _compiled(outside, torch.compile(block.forward, dynamic=dynamic, backend=backend))


def _compiled(outside: Callable[..., Tensor], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        visual: Tensor, text: Tensor, time_embed: Tensor, rope: Rope, attention: AttentionFn, text_mask: Tensor | None
    ) -> Tensor:
        # NABLA's lists of blocks and other packages' kernels are no part of the graph.
        inner = attention if attention is dense_attention else partial(outside, attention)
        return forward(visual, text, time_embed, rope, inner, text_mask)

    return call


def _call(attention: AttentionFn, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return attention(q, k, v, key_mask)
