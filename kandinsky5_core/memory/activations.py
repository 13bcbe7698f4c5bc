"""The most that activations take at once, counted tensor by tensor along the forward passes, without gradients.

Shape legend: B batch, S visual tokens, L text tokens, D model_dim, n token blocks of NABLA. Element sizes are bytes of
one number in the run's dtype. What a kernel takes for itself is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from ..config import BLOCK_TOKENS, DiTConfig, VAEConfig
from ..shapes import LatentShape, VideoShape
from ..vae.tile_plan import WORKSPACE, activation_bytes, latents_of_pixels, plan_decode, plan_encode
from .parameters import TextSizes

FP32, ROPE_SIZE = 4, 2
"""Bytes of a number in fp32, and of the bf16 that rotated queries and keys are rounded to."""
MAX_SCORES = 2**24
"""Of `attention.block_mask`: entries of the pooled map that are sorted at a time."""
CAST_NUMBERS = 2**20
"""Of `dit.layers`."""
SORT_BYTES = 29
"""A sorted entry: scores and probabilities, the same sorted, its order, running sums, and what is kept."""
MASK_BYTES = 9
"""An entry of the block mask: the mask itself, and its lists of blocks before and after they are joined."""


def block_bytes(config: DiTConfig, tokens: int, element_size: int, *, first: bool = False) -> int:
    """Of one block's forward pass over `tokens`, its input and the model's first tokens with it.

    It peaks either where keys are rotated (first tokens, input, normed, query, key, value, rotated query; then an
    fp32 copy, the product and two roundings) or in the feed-forward (first tokens, input, stream, the attended ones,
    normed, hidden, result).

    Args:
        first: The block's input is the model's first tokens, so these do not stay beside it.
    """
    stream = 5 if first else 6
    copied = 0 if element_size == FP32 else FP32
    rounded = ROPE_SIZE + (0 if element_size == ROPE_SIZE else element_size)
    attention = (stream + 1) * element_size + FP32 + copied + rounded
    feed_forward = stream * element_size
    widest = max(attention * config.model_dim, feed_forward * config.model_dim + config.ff_dim * element_size)
    # The rotary table as complex numbers, which is made for each use of it.
    return tokens * (widest + FP32 * config.head_dim)


def dit_bytes(
    config: DiTConfig, num_tokens: int, element_size: int, *, batch: int = 1, text_tokens: int = 256,
    nabla: bool = False, on_cpu: bool = False,
) -> int:  # fmt: skip
    """Of one evaluation of the DiT, its inputs not counted.

    Args:
        num_tokens: S; under NABLA padded to whole token blocks.
        nabla: With NABLA's block mask.
        on_cpu: Modulation weights are cast to fp32 in parts (`dit.layers.CAST_NUMBERS`), elsewhere whole.
    """
    single = config.num_visual_blocks == 1
    visual = batch * (block_bytes(config, 1, element_size, first=single) * num_tokens)
    if nabla:
        visual = max(visual, nabla_bytes(config, num_tokens, element_size, batch=batch))
    refined = batch * text_tokens * config.model_dim * element_size
    refining = batch * block_bytes(config, text_tokens, element_size, first=config.num_text_blocks == 1)
    modulation = batch * 9 * config.model_dim * FP32
    weights = 0 if element_size == FP32 else 9 * config.model_dim * config.time_dim
    cast = FP32 * (min(weights, CAST_NUMBERS) if on_cpu else weights)
    entering = 2 * batch * num_tokens * config.model_dim * element_size
    return max(refined + visual, refining, refined + entering + cast) + modulation


def nabla_bytes(config: DiTConfig, num_tokens: int, element_size: int, *, batch: int = 1) -> int:
    """At NABLA's own peak in a block: while the pooled map is sorted, or while blocks are gathered for attention."""
    blocks = num_tokens // BLOCK_TOKENS
    entries = batch * config.num_heads * blocks**2
    sorted_at_once = min(entries, max(1, MAX_SCORES // blocks**2) * blocks**2)
    stream = batch * num_tokens * config.model_dim * element_size
    return max(6 * stream + 3 * entries + SORT_BYTES * sorted_at_once, 12 * stream + MASK_BYTES * entries)


def sampler_bytes(latent_shape: Sequence[int], config: DiTConfig, element_size: int, *, evaluations: int) -> int:
    """Of the sampling loop around the DiT: noise, latents and the first guess in fp32, and the model's input.

    Args:
        evaluations: Rows of the batch in one evaluation, for one row of latents: 2 with batched guidance.
    """
    cells = prod(latent_shape) // latent_shape[1]
    shown = config.input_channels * (1 + (evaluations if evaluations > 1 else 0))
    return cells * (3 * config.in_visual_dim * FP32 + shown * element_size)


def rope_bytes(config: DiTConfig, num_tokens: int) -> int:
    """The rotary table of a clip: cosines and sines, kept for the whole run."""
    return num_tokens * config.head_dim * FP32


def text_bytes(sizes: TextSizes, num_tokens: int, element_size: int) -> int:
    """Of Qwen reading `num_tokens`: gate, its activation and up beside four streams, and the rotary table in fp32.

    Measured, the same for one layer and for many.
    """
    return num_tokens * ((3 * sizes.hidden + 4 * sizes.dim) * element_size + FP32 * sizes.head_dim)


def vae_bytes(shape: VideoShape, config: VAEConfig, direction: str, *, budget: int, element_size: int) -> int:
    """Of one VAE pass, tiled as `vae.tile_plan` plans for `budget`: live tensors of a tile, and the whole result."""
    latents = shape.latent_shape(config)
    pixels = (shape.batch, 3, shape.frames, shape.height, shape.width)
    planned = {"budget_bytes": budget, "bytes_per_element": element_size}
    plan = plan_decode(latents, config, **planned) if direction == "decode" else plan_encode(pixels, config, **planned)
    tile = LatentShape(
        plan.batch, latents.channels, min(plan.frames, latents.frames), min(plan.height, latents.height),
        min(plan.width, latents.width),
    )  # fmt: skip
    work = ceil(activation_bytes(tile, config, direction=direction, bytes_per_element=element_size) / WORKSPACE)
    if direction == "encode" and config.layers_per_block == 1:
        # The resnet it peaks in has no other before it whose result stays.
        work -= prod(VideoShape.from_latent(tile, config)) * config.block_out_channels[0] * element_size
    if plan.num_tiles(latents) == 1:
        return work
    result = prod(pixels) if direction == "decode" else 2 * prod(latents_of_pixels(pixels, config))
    return work + FP32 * result
