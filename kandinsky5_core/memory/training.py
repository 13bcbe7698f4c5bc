"""What a training step will need: our own count, and the report's formulas (1) and (2) (section 7.3) beside it."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import DiTConfig
from . import parameters
from .options import AS_IS

FP32 = 4
REFERENCE_DIM, REFERENCE_PIXELS = 1792, 256 * 384 * 31
"""d0 and S0 of formula (1)."""
REPORT_BYTES_HELD, REPORT_BYTES_GRADIENTS = 12, 4
LORA_LAYERS = 10
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 8}
"""States of one moving number that is fp32; Muon keeps one for the matrices, here counted as AdamW's two."""
# Bytes of one token over model_dim, by (LoRA, bytes of a number in the weights' dtype), for a feed-forward of four
# times the width, which all variants have: counted from the live tensors of training steps.
KEPT_BY_BLOCK = {(True, 4): 93.0, (True, 2): 62.1, (False, 4): 129.2, (False, 2): 97.9}
KEPT_BY_ENDS = {(True, 4): 32.0, (True, 2): 14.5, (False, 4): 25.6, (False, 2): 23.7}
ONE_BLOCK_AGAIN = {(True, 4): 126.0, (True, 2): 80.0, (False, 4): 134.0, (False, 2): 108.0}
"""With checkpointing: a block computed once more and its backward pass, and the ends."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training step."""

    config: DiTConfig
    num_tokens: int
    """Visual tokens of a batch: S times its rows."""
    rank: int = 0
    """Of the LoRA; 0: all weights move."""
    element_size: int = 0
    """Bytes of a number of the weights; 0: as `train` chooses, 2 for a frozen base and 4 for weights that move."""
    base_weights: str = AS_IS
    """Of a frozen base: 'as-is', 'int8' or 'fp8'."""
    checkpointing: bool = False
    optimizer: str = "adamw"
    ema: bool = True

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZER_BYTES:
            raise ValueError(f"optimizer '{self.optimizer}' is unknown; use one of {', '.join(OPTIMIZER_BYTES)}")
        if self.base_weights != AS_IS and not self.rank:
            raise ValueError(f"base_weights '{self.base_weights}' needs a LoRA: weights that move are not quantised")

    @property
    def size(self) -> int:
        return self.element_size or (2 if self.rank else 4)

    @property
    def moving(self) -> int:
        """Numbers that move."""
        return lora_numbers(self.config, self.rank) if self.rank else parameters.dit(self.config).total


@dataclass(frozen=True, kw_only=True)
class TrainingNeed:
    """Bytes on the device at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def lora_numbers(config: DiTConfig, rank: int) -> int:
    """Numbers of a LoRA on the ten linear layers of every visual block and the six of every text block."""
    dim, hidden = config.model_dim, config.ff_dim
    attention, feed_forward = 4 * 2 * dim * rank, 2 * (dim + hidden) * rank
    return (
        config.num_visual_blocks * (2 * attention + feed_forward) + config.num_text_blocks * (attention + feed_forward)
    )  # fmt: skip


def training_need(job: TrainingJob) -> TrainingNeed:
    """What a step takes. LoRA matrices, and their gradients, states and average, are fp32."""
    moving_size = FP32 if job.rank else job.size
    weights = parameters.dit(job.config).num_bytes(job.base_weights, job.size)
    weights += job.moving * FP32 if job.rank else 0
    # States are of the weights' dtype, in eight bits one byte each.
    states = OPTIMIZER_BYTES[job.optimizer] * (moving_size if job.optimizer != "adamw8bit" else FP32) // FP32
    return TrainingNeed(
        weights=weights, gradients=job.moving * moving_size, optimizer=job.moving * states,
        ema=job.moving * FP32 if job.ema else 0,
        activations=activation_peak(job) - job.moving * moving_size,
    )  # fmt: skip


def activation_peak(job: TrainingJob) -> int:
    """Activations together with the gradients at the peak: before the backward pass, when all that is kept is there,
    or at its end, when all gradients are."""
    key, stream = (job.rank > 0, job.size), job.num_tokens * job.config.model_dim
    blocks = job.config.num_visual_blocks
    gradients = job.moving * (FP32 if job.rank else job.size)
    again = round(ONE_BLOCK_AGAIN[key] * stream)
    if job.checkpointing:
        return again + max(gradients, blocks * stream * job.size)
    low_rank = LORA_LAYERS * job.rank * job.size * job.num_tokens
    kept = round(KEPT_BY_ENDS[key] * stream) + blocks * (round(KEPT_BY_BLOCK[key] * stream) + low_rank)
    return max(kept, again + gradients)


def report_step_time(config: DiTConfig, pixels: int, batch: int) -> float:
    """Formula (1): time of a step in the report's units.

    Args:
        pixels: height x width x latent frames, as S0 = 256*384*31 counts them.
    """
    size, width = pixels / REFERENCE_PIXELS, config.model_dim / REFERENCE_DIM
    return width * size * (9 + 14 * size + 6 * width) * config.num_visual_blocks * batch


def report_bytes(config: DiTConfig, num_tokens: int, *, gpus: int = 1, offloaded: bool = False) -> float:
    """Formula (2): bytes a GPU of full training with block checkpoints; with `offloaded` activations o is 0."""
    dim, blocks = config.model_dim, config.num_visual_blocks
    numbers = blocks * (9 * config.time_dim * dim + 8 * dim**2 + 2 * config.ff_dim * dim) / gpus
    activations = 2 * num_tokens * (blocks * dim * (0 if offloaded else 1) + 18 * dim + 2 * config.ff_dim)
    return REPORT_BYTES_HELD * numbers + max(REPORT_BYTES_GRADIENTS * numbers, activations)
