"""Encode and decode within a memory budget: the entry that everything but tests and benchmarks calls.

Shapes: latents (B, C, T, h, w), unscaled; pixels (B, 3, F, H, W) in [-1, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..shapes import LatentShape
from .hunyuan.model import HunyuanVAE
from .hunyuan.passes import decode_streamed, encode_streamed
from .pass_plan import PassPlan, describe, plan_bytes, plan_pass
from .stream_plan import StreamPlan
from .tile_plan import latents_of_pixels
from .tiling import VAE, OnTile, decode_tiled, encode_tiled

log = logging.getLogger(__name__)


def decode_within(
    vae: VAE, latents: Tensor, budget_bytes: int, on_tile: OnTile | None = None,
    *, output_device: torch.device | str | None = None, told: dict[str, object] | None = None,
) -> Tensor:  # fmt: skip
    """Pixels (B, 3, F, H, W), fp32, about [-1, 1] and not clamped, of unscaled latents (B, C, T, h, w).

    Exactly `vae.decode` where the clip fits plainly. No gradients.

    Args:
        budget_bytes: what the work may take beside weights, latents and result. Where the device has less, the pass is
            planned again with half, and a warning says so.
        on_tile: called as on_tile(done, total) after each step; what it raises ends the work.
        told: the way that ran is put there as 'vae_decode'.

    Raises:
        ValueError: the budget holds no way at all.
        RuntimeError: the device's memory does not hold the smallest way.
    """

    def run(plan: PassPlan) -> Tensor:
        decode = decode_streamed if isinstance(plan, StreamPlan) else decode_tiled
        return decode(vae, latents, plan, on_tile, output_device=output_device)

    return _within(vae, LatentShape(*latents.shape), latents, budget_bytes, "decode", run, told)


def encode_within(
    vae: VAE, pixels: Tensor, budget_bytes: int, on_tile: OnTile | None = None,
    *, generator: torch.Generator | None = None, output_device: torch.device | str | None = None,
    told: dict[str, object] | None = None,
) -> Tensor:  # fmt: skip
    """Unscaled latents (B, C, T, h, w), fp32, of pixels (B, 3, F, H, W) in [-1, 1]; see `decode_within`.

    The posterior mean, or with a generator one sample. The way that ran is told as 'vae_encode'.

    Raises:
        ValueError: a size that the VAE cannot take, or the budget holds no way at all.
        RuntimeError: the device's memory does not hold the smallest way.
    """

    def run(plan: PassPlan) -> Tensor:
        encode = encode_streamed if isinstance(plan, StreamPlan) else encode_tiled
        return encode(vae, pixels, plan, on_tile, generator=generator, output_device=output_device)

    return _within(vae, latents_of_pixels(pixels.shape, vae.config), pixels, budget_bytes, "encode", run, told)


def _within(
    vae: VAE, shape: LatentShape, given: Tensor, budget_bytes: int, direction: str,
    run: Callable[[PassPlan], Tensor], told: dict[str, object] | None,
) -> Tensor:  # fmt: skip
    sizes = {"direction": direction, "bytes_per_element": given.dtype.itemsize}
    find = partial(plan_pass, shape, vae.config, can_stream=isinstance(vae, HunyuanVAE), **sizes)
    plan = find(budget_bytes=budget_bytes)
    while True:
        words = describe(plan, shape, vae.config)
        log.info("VAE %s of %s: %s", direction, "x".join(map(str, shape)), words)
        try:
            result = run(plan)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            if told is not None:
                told[f"vae_{direction}"] = words
            return result
        # Outside `except`, where the error's frames no longer hold what the failed pass had made.
        taken = plan_bytes(plan, shape, vae.config, **sizes)
        plan = _smaller(find, min(budget_bytes, taken) // 2, direction, words, problem)
        budget_bytes = min(budget_bytes, taken) // 2
        if given.device.type == "cuda":
            torch.cuda.empty_cache()


def _smaller(find: Callable[..., PassPlan], budget_bytes: int, direction: str, words: str, problem: str) -> PassPlan:
    """The plan for a smaller budget, said.

    Raises:
        RuntimeError: there is none.
    """
    try:
        plan = find(budget_bytes=budget_bytes)
    except ValueError as error:
        raise RuntimeError(
            f"VAE {direction} ran out of memory ({words}) and no smaller way is left; free memory on the device, or "
            f"make fewer frames or smaller ones. The device said: {problem}"
        ) from error
    log.warning(
        "VAE %s ran out of memory (%s): %s. Planned again with %d MiB; a smaller VAE budget avoids the lost time",
        direction, words, problem, budget_bytes // 2**20,
    )  # fmt: skip
    return plan


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's allocator, or the CPU's, has run out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "not enough memory" in said)
