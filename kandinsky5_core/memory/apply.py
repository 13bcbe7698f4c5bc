"""Compilation and gradient checkpointing, applied to a DiT from outside: no model file knows of them."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..dit.model import DiffusionTransformer


def checkpoint_blocks(dit: DiffusionTransformer) -> None:
    """Recompute every block in the backward pass instead of keeping its activations; results stay equal."""
    for block in (*dit.text_transformer_blocks, *dit.visual_transformer_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(dit: DiffusionTransformer, *, dynamic: bool | None = None) -> None:
    """torch.compile each visual block in place: the blocks share one graph, so it is compiled once.

    Keys of the state dict do not change.
    """
    for block in dit.visual_transformer_blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
