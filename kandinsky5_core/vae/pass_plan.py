"""Which way a VAE pass goes: plainly, layer by layer, streamed, or in tiles; by size and a stated memory budget.

What fits plainly runs plainly. Else the way of least work that fits: layer by layer computes nothing twice and is
exact; streaming computes samples and margins beside the clip, tiles their overlaps. Between the last two nearness to
the plain pass counts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import VAEConfig
from ..shapes import LatentShape
from .stream_plan import StreamPlan, plan_stream, stream_bytes, stream_work
from .tile_plan import TilePlan, activation_bytes, plan_tiles, tile_work

PassPlan = TilePlan | StreamPlan
SEAMS_MUST_SAVE = 1.25
"""Tiles are further from the plain pass, by 20 dB on Nano: they are taken where streaming is this much more work."""


def plan_pass(
    latent_shape: Sequence[int], config: VAEConfig, *, direction: str, budget_bytes: int, bytes_per_element: int = 2,
    can_stream: bool = True,
) -> PassPlan:  # fmt: skip
    """The way to decode latents of shape (B, C, T, h, w), or to encode pixels to them, within `budget_bytes`.

    Args:
        direction: 'encode' or 'decode'.
        can_stream: False where the VAE's layers cannot be run one by one.

    Raises:
        ValueError: the budget holds no way at all.
    """
    shape, streamed = LatentShape(*latent_shape), None
    if can_stream and config.kind == "hunyuan":
        streamed = plan_stream(
            shape, config, direction=direction, budget_bytes=budget_bytes, bytes_per_element=bytes_per_element
        )
    try:
        tiles = plan_tiles(shape, config, direction, budget_bytes, bytes_per_element)
    except ValueError:
        if streamed is None:
            raise
        return streamed
    if streamed is None or is_plain(tiles, shape):
        return tiles
    by_stream = stream_work(streamed, shape, config, direction=direction)
    return tiles if SEAMS_MUST_SAVE * tile_work(tiles, shape, config) < by_stream else streamed


def is_plain(plan: PassPlan, latent_shape: Sequence[int]) -> bool:
    """Whether each clip of the batch is one piece."""
    shape = LatentShape(*latent_shape)
    return isinstance(plan, TilePlan) and plan.num_tiles(shape) == math.ceil(shape.batch / plan.batch)


def plan_bytes(
    plan: PassPlan, latent_shape: Sequence[int], config: VAEConfig, *, direction: str, bytes_per_element: int = 2
) -> int:
    """Estimated peak memory of a pass by `plan`; weights, what is given and the result not counted."""
    shape = LatentShape(*latent_shape)
    if isinstance(plan, StreamPlan):
        return stream_bytes(plan, shape, config, direction=direction, bytes_per_element=bytes_per_element)
    sizes = {axis: min(getattr(plan, axis), getattr(shape, axis)) for axis in ("batch", "frames", "height", "width")}
    return activation_bytes(
        shape._replace(**sizes), config, direction=direction, bytes_per_element=bytes_per_element
    )


def describe(plan: PassPlan, latent_shape: Sequence[int], config: VAEConfig) -> str:
    """A plan in words, for settings and logs."""
    shape = LatentShape(*latent_shape)
    if is_plain(plan, shape):
        return "plain"
    if isinstance(plan, TilePlan):
        size = f"{min(plan.frames, shape.frames)}x{min(plan.height, shape.height)}x{min(plan.width, shape.width)}"
        return f"tiles: {plan.num_tiles(shape)} of {size} cells"
    levels, tiles = len(config.block_out_channels), plan.num_tiles(shape)
    if plan.exact_levels == levels:
        return f"layer by layer, exact: {plan.frames} frames at a time"
    return (
        f"streamed: {plan.frames} frames at a time, {plan.exact_levels} of {levels} levels exact, norms of the others "
        f"from {plan.windows} sample(s) of {plan.window_height}x{plan.window_width} cells, {tiles} tile(s)"
    )
