"""NABLA as a MODEL patch, on our models and on ComfyUI's own Kandinsky 5 class.

Ours ask for it themselves. ComfyUI's class flattens tokens row by row and calls its attention function, so there the
tokens are put into block order inside that call, which changes nothing else: attention does not mind the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.patcher_extension
from einops import rearrange
from torch import Tensor

from ...kandinsky5_core.attention.nabla import NablaAttention
from ...kandinsky5_core.config import NablaConfig
from .dit import ATTENTION_OPTION
from .model import variant_of

MODES = ("auto", "dense", "nabla")
_GRID = "k5_token_grid"
_KEY = "k5_nabla"
_OVERRIDE = "optimized_attention_override"


def patch_attention(model: Any, mode: str, mass: float, window: tuple[int, int, int]) -> Any:
    """A clone of the MODEL with that attention.

    Raises:
        ValueError: the MODEL is no Kandinsky 5, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode '{mode}' is unknown; use one of {', '.join(MODES)}")
    if not isinstance(model.model, comfy.model_base.Kandinsky5):
        raise ValueError("model is no Kandinsky 5; load one with Load Kandinsky 5 Model or Load Diffusion Model")
    variant = variant_of(model)
    patched = model.clone()
    config = NablaConfig(mass=mass, window=window) if mode == "nabla" else None
    options = patched.model_options.setdefault("transformer_options", {})
    if variant is not None:
        options.pop(ATTENTION_OPTION, None)
        if mode != "auto":
            options[ATTENTION_OPTION] = config
        return patched
    earlier = options.get(_OVERRIDE)
    earlier = earlier.earlier if isinstance(earlier, NativeNabla) else earlier
    patched.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, _KEY)
    options.pop(_OVERRIDE, None)
    if config is not None:
        options[_OVERRIDE] = NativeNabla(config, earlier)
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, _KEY, _note_grid)
    elif earlier is not None:
        options[_OVERRIDE] = earlier
    return patched


def _note_grid(executor: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tells the attention function, which sees only rows of tokens, how they lie in the clip."""
    options = kwargs.get("transformer_options")
    if options is not None and x.ndim == 5:
        options[_GRID] = (x.shape[2], (x.shape[3] + 1) // 2, (x.shape[4] + 1) // 2)
    return executor(x, *args, **kwargs)


class NativeNabla:
    """An attention override for ComfyUI's own DiT; keeps the window mask of the last size."""

    def __init__(self, config: NablaConfig, earlier: Callable[..., Tensor] | None = None) -> None:
        """
        Args:
            earlier: Another pack's override, which still serves the text.
        """
        self.config, self.earlier = config, earlier
        self.made: NablaAttention | None = None

    def __call__(
        self, original: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Sparse for attention among all visual tokens, the original for text."""
        grid = (kwargs.get("transformer_options") or {}).get(_GRID)
        skip = kwargs.get("skip_reshape", False)
        length, key_length = (part.shape[2 if skip else 1] for part in (q, k))
        if grid is None or length != grid[0] * grid[1] * grid[2] or key_length != length:
            if self.earlier is not None:
                return self.earlier(original, q, k, v, heads, *args, **kwargs)
            return original(q, k, v, heads, *args, **kwargs)
        if not skip:
            q, k, v = (rearrange(part, "b s (n d) -> b n s d", n=heads) for part in (q, k, v))
        nabla = self._for(grid, q)
        q, k, v = (nabla.reorder(part, dim=2) for part in (q, k, v))
        attended = nabla.restore(nabla(q, k, v), dim=2)
        if kwargs.get("skip_output_reshape", False):
            return attended
        return rearrange(attended, "b n s d -> b s (n d)")

    def _for(self, grid: tuple[int, int, int], q: Tensor) -> NablaAttention:
        if self.made is None or self.made.tokens.grid != grid or self.made.window.device != q.device:
            self.made = NablaAttention(self.config, grid, device=q.device)
        return self.made
