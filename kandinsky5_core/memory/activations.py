"""The most that activations take at once, counted tensor by tensor along the forward passes, without gradients.

Shape legend: B batch, S visual tokens, L text tokens, D model_dim, n token blocks of NABLA. Element sizes are bytes of
one number in the run's dtype. What a kernel takes for itself is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from ..config import BLOCK_TOKENS, DiTConfig, VAEConfig
from ..shapes import LatentShape, VideoShape
from ..vae.pass_plan import is_plain, plan_pass
from ..vae.stream_plan import StreamPlan, stream_bytes
from ..vae.tile_plan import WORKSPACE, activation_bytes
from .parameters import TextSizes

FP32, ROPE_SIZE = 4, 2
"""Bytes of a number in fp32, and of the bf16 that rotated queries and keys are rounded to."""
MAX_SCORES = 2**24
"""Of `attention.block_mask`: entries of the pooled map that are sorted at a time."""
CAST_NUMBERS = 2**20
"""Of `dit.layers`, as the four below: weights cast at a time, numbers of the tokens computed at a time, and pieces."""
PIECE_NUMBERS_CPU, PIECE_NUMBERS, MATMUL_PIECE, QUARTERS = 2**18, 2**24, 2**24, 4
GATHERED_NUMBERS_CPU = 2**20
"""Of `attention.gather`: numbers of the keys, and of the values, that are copied together at a time."""
SORT_BYTES = 29
"""A sorted entry: scores and probabilities, the same sorted, its order, running sums, and what is kept."""
LIST_BYTES = 20
"""An entry that is made into lists: ranks, places, both again as 64 bits, and what is written."""
MASK_BYTES = 5
"""An entry of the block mask: the mask itself, and its list of blocks."""


UNPACKED_BYTES = {"fp8": 10, "int8": 2}
"""A number of a weight that torchao unpacks for a product, with the copies on the way."""


def block_bytes(
    config: DiTConfig, tokens: int, element_size: int, *, on_cpu: bool = False, whole: bool = False
) -> int:  # fmt: skip
    """Of one block's forward pass over `tokens`, its input included.

    It peaks in self-attention (input, normed, query, key, value, and the attended ones), or, where the tokens are few,
    while keys are rotated (a normed and an fp32 copy, the product, and two roundings, of one piece) or in the
    feed-forward (input, stream, normed, result where it has pieces; hidden and result of one).

    Args:
        whole: The feed-forward has no pieces: in compiled blocks, and where ComfyUI casts weights at every call.
    """
    stream = tokens * config.model_dim * element_size
    piece = min(tokens * config.model_dim, PIECE_NUMBERS_CPU if on_cpu else PIECE_NUMBERS)
    copied = 0 if element_size == FP32 else FP32
    rounded = ROPE_SIZE + (0 if element_size == ROPE_SIZE else element_size)
    # The rotary table as complex numbers, which is made for each use of it.
    table = FP32 * config.head_dim * (piece // config.model_dim)
    rotating = 5 * stream + piece * (element_size + copied + FP32 + rounded) + table
    numbers = tokens * config.model_dim
    matmul = numbers if whole else min(numbers, max(MATMUL_PIECE, ceil(numbers / QUARTERS)))
    hidden = matmul // config.model_dim * config.ff_dim
    together = 3 * stream if matmul == numbers else 4 * stream
    feeding = together + element_size * (hidden + matmul)
    return max(6 * stream, rotating, feeding)


def dit_bytes(
    config: DiTConfig, num_tokens: int, element_size: int, *, batch: int = 1, text_tokens: int = 256,
    nabla: bool = False, on_cpu: bool = False, whole: bool = False,
) -> int:  # fmt: skip
    """Of one evaluation of the DiT, its inputs not counted.

    Args:
        num_tokens: S; under NABLA padded to whole token blocks.
        nabla: With NABLA's block mask.
        on_cpu: There weights and tokens are cast to fp32 in smaller parts.
        whole: As of `block_bytes`.
    """
    visual = block_bytes(config, batch * num_tokens, element_size, on_cpu=on_cpu, whole=whole)
    if nabla:
        visual = max(visual, nabla_bytes(config, num_tokens, element_size, batch=batch, on_cpu=on_cpu))
    refined = batch * text_tokens * config.model_dim * element_size
    refining = block_bytes(config, batch * text_tokens, element_size, on_cpu=on_cpu)
    modulation = batch * 9 * config.model_dim * FP32
    weights = 0 if element_size == FP32 else 9 * config.model_dim * config.time_dim
    cast = FP32 * (min(weights, CAST_NUMBERS) if on_cpu else weights)
    entering = 2 * batch * num_tokens * config.model_dim * element_size
    return max(refined + visual, refining, refined + entering + cast) + modulation


def nabla_bytes(
    config: DiTConfig, num_tokens: int, element_size: int, *, batch: int = 1, on_cpu: bool = False
) -> int:  # fmt: skip
    """At NABLA's own peak in a block: while the pooled map is sorted, while lists are made of it, or in attention.

    On a GPU that is FlexAttention; where it does not work, gathered blocks take a quarter of a GiB more in 16 bits.
    """
    blocks = num_tokens // BLOCK_TOKENS
    entries = batch * config.num_heads * blocks**2
    sorted_at_once = min(entries, max(1, MAX_SCORES // blocks**2) * blocks**2)
    stream = batch * num_tokens * config.model_dim * element_size
    gathered = 2 * GATHERED_NUMBERS_CPU * element_size if on_cpu else 0
    return max(
        5 * stream + entries + SORT_BYTES * sorted_at_once,
        5 * stream + MASK_BYTES * entries + LIST_BYTES * sorted_at_once,
        6 * stream + MASK_BYTES * entries + gathered,
    )


def step_cache_bytes(
    config: DiTConfig, num_tokens: int, element_size: int, *, batch: int, evaluations: int, guided: bool
) -> int:  # fmt: skip
    """What MagCache keeps on the device: the tokens of an evaluation before its blocks, and what these added to the
    tokens of each pass of guidance."""
    return (evaluations + (2 if guided else 1)) * batch * num_tokens * config.model_dim * element_size


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
    """Of one VAE pass, as `vae.pass_plan` plans it for `budget`: live tensors, and the whole result in fp32 where it
    is put together of parts."""
    latents = shape.latent_shape(config)
    sizes = {"direction": direction, "bytes_per_element": element_size}
    plan = plan_pass(latents, config, budget_bytes=budget, **sizes)
    result = FP32 * (3 * prod(shape) if direction == "decode" else 2 * prod(latents))
    if isinstance(plan, StreamPlan):
        return ceil(stream_bytes(plan, latents, config, **sizes) / WORKSPACE) + result
    tile = LatentShape(
        plan.batch, latents.channels, min(plan.frames, latents.frames), min(plan.height, latents.height),
        min(plan.width, latents.width),
    )  # fmt: skip
    work = ceil(activation_bytes(tile, config, **sizes) / WORKSPACE)
    if direction == "encode" and config.layers_per_block == 1:
        # The resnet it peaks in has no other before it whose result stays.
        work -= prod(VideoShape.from_latent(tile, config)) * config.block_out_channels[0] * element_size
    return work if is_plain(plan, latents) else work + result
