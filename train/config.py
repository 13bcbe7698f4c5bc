"""Settings of a training run. Standard library only, so that nodes can import it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast; what is minimised is the objective's business."""

    num_steps: int
    learning_rate: float
    """Peak of the schedule."""
    warmup_steps: int = 100
    schedule: str = "cosine"
    """'cosine' falls to `final_rate` of the peak at the last step; 'constant' stays."""
    final_rate: float = 0.02
    optimizer: str = "adamw"
    """'adamw', or 'muon' for the matrices inside transformer blocks with AdamW for the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    """Of the averaged weights that are saved as the result; warmed up as (1+n)/(10+n)."""
    checkpoint_every: int = 500
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16 in the forward pass."""

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got '{self.schedule}'")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got '{self.optimizer}'")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")


TARGETS = (
    "self_attention.to_query", "self_attention.to_key", "self_attention.to_value", "self_attention.out_layer",
    "cross_attention.to_query", "cross_attention.to_key", "cross_attention.to_value", "cross_attention.out_layer",
    "feed_forward.in_layer", "feed_forward.out_layer",
)  # fmt: skip
"""The ten linear layers of a block that the official LoRAs move."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    """Endings of the names of the layers that get one."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be from 0 to below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
