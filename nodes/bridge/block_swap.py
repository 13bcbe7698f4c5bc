"""Block swap on a MODEL: ComfyUI streams weights that are not loaded; this says how many shall never be."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

log = logging.getLogger(__name__)


class Limited(comfy.model_patcher.ModelPatcher):
    """A patcher that loads no more than a given number of bytes; ComfyUI brings in the rest layer by layer."""

    kept_out = 0
    """Bytes of weights that stay in CPU memory."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Load up to `extra_memory` bytes more, but not beyond the limit; what is over it goes back."""
        if self.kept_out:
            extra_memory = min(extra_memory, self.model_size() - self.kept_out - self.loaded_size())
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def clone(self, *args: Any, **kwargs: Any) -> Limited:
        """A clone with the same limit."""
        made = super().clone(*args, **kwargs)
        made.__class__, made.kept_out = type(self), self.kept_out
        return made


def swap_blocks(model: Any, count: int) -> Any:
    """A clone of a Kandinsky 5 MODEL of whose visual blocks `count` wait in CPU memory; 0 lifts the limit.

    Raises:
        ValueError: the MODEL is another, or has fewer blocks.
    """
    blocks = getattr(getattr(model.model, "diffusion_model", None), "visual_transformer_blocks", None)
    if blocks is None:
        raise ValueError("model is no Kandinsky 5 MODEL; connect one of a Kandinsky 5 loader or of Load Diffusion Model")
    if not 0 <= count <= len(blocks):
        raise ValueError(f"blocks {count} does not fit a model of {len(blocks)} visual blocks; use 0 to {len(blocks)}")
    made = model.clone()
    if _is_dynamic(made):
        log.info(
            "Kandinsky 5 Block Swap: this MODEL is under ComfyUI's dynamic VRAM, which decides in every step what waits; "
            "nothing was changed"
        )
        return made
    if not isinstance(made, Limited):
        made.__class__ = _limited(type(made))
    size = sum(comfy.model_management.module_size(block) for block in list(blocks)[:count])
    made.kept_out = size
    log.info(
        "Kandinsky 5 Block Swap: %d of %d blocks (%.0f MiB of %.0f) wait in CPU memory",
        count, len(blocks), size / 2**20, made.model_size() / 2**20,
    )  # fmt: skip
    return made


def _is_dynamic(model: Any) -> bool:
    asked = getattr(model, "is_dynamic", None)  # older ComfyUI has no dynamic VRAM
    return asked is not None and asked()


def _limited(kind: type) -> type:
    """`kind`, which loads no more than it may: other packs have patchers of their own."""
    return Limited if kind is comfy.model_patcher.ModelPatcher else type(f"Limited{kind.__name__}", (Limited, kind), {})
