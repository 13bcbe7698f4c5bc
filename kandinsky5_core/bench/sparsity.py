"""The mass at which NABLA drops a given share of blocks in a model's own attention, and what it drops there.

With random weights the pooled attention map is almost flat: a mass that leaves a tenth of the blocks in a trained model
leaves nine tenths here, and its time would say nothing. So the mass is found from the model's own queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.block_mask import pool_blocks, pooled_mass_mask, window_mask
from ..attention.dense import AttentionFn
from ..attention.nabla import NablaAttention
from ..attention.token_blocks import token_blocks
from ..config import NablaConfig

CLOSE = 0.005
"""How near to the share asked for is near enough."""
ROUNDS = 3
"""Another mass moves the tokens that later blocks see, so it is looked for again where it has moved them far."""
LOOKED_AT = 8
"""Blocks of the model from which the mass is found; what it drops is measured over all."""
BISECTIONS = 14
LEAST_MASS = 1e-6
Step = Callable[[NablaAttention], object]
"""One evaluation of the model with this attention among its visual tokens."""
Pooled = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A mass, and the share of token blocks that it drops in each visual block of the model."""

    config: NablaConfig
    shares: tuple[float, ...]
    path: str
    """How NABLA computed it."""

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares)

    def facts(self) -> dict[str, object]:
        """For a report, shares to four digits."""
        return {
            "mass": self.config.mass, "window": list(self.config.window), "sparsity": round(self.mean, 4),
            "sparsity_range": [round(min(self.shares), 4), round(max(self.shares), 4)], "path": self.path,
        }  # fmt: skip


class Recorded(NablaAttention):
    """NABLA that keeps the pooled queries and keys of every call; with `dense` it attends by that instead."""

    def __init__(
        self, config: NablaConfig, grid: tuple[int, int, int], *, device: torch.device, dense: AttentionFn | None = None
    ) -> None:
        super().__init__(config, grid, device=device)
        self.dense, self.pooled = dense, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """As `NablaAttention`."""
        self.pooled.append((pool_blocks(q, self.token_mask) * q.shape[-1] ** -0.5, pool_blocks(k, self.token_mask)))
        if self.dense is None:
            return super().__call__(q, k, v, key_mask)
        real = None if self.token_mask is None else self.token_mask.expand(len(q), -1)
        return self.dense(q, k, v, real)


def check_sparsity(
    sparsity: float, grid: tuple[int, int, int] | None = None, config: NablaConfig | None = None
) -> None:
    """Refuse a share of dropped blocks that cannot be.

    Raises:
        ValueError: it is no share, or NABLA's window alone keeps more blocks of this grid than it leaves.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity {sparsity} must be above 0 and below 1")
    if grid is None or config is None:
        return
    kept = float(window_mask(token_blocks(grid).blocks, config.window).float().mean())
    if kept > 1 - sparsity:
        raise ValueError(
            f"--sparsity {sparsity} cannot be had with {grid[0]} x {grid[1]} x {grid[2]} tokens: NABLA's window alone "
            f"keeps {kept:.0%} of the blocks; use at most {1 - kept:.2f}, or a larger size"
        )


def measured_shares(
    step: Step, config: NablaConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Found, Pooled]:
    """What `config` drops in each visual block of one evaluation, and the pooled queries and keys there."""
    nabla = Recorded(config, grid, device=device)
    step(nabla)
    shares = tuple(dropped_share(*pair, nabla) for pair in nabla.pooled)
    return Found(config=config, shares=shares, path=nabla.told), nabla.pooled


def found_mass(
    step: Step, config: NablaConfig, sparsity: float, grid: tuple[int, int, int], device: torch.device,
    dense: AttentionFn,
) -> Found:  # fmt: skip
    """The mass at which the model drops this share of blocks, window included, over all its visual blocks.

    Args:
        config: Its window is kept.
        dense: Attention of the first evaluation, which has no mass yet.

    Raises:
        ValueError: no mass can.
    """
    check_sparsity(sparsity, grid, config)
    nabla = Recorded(config, grid, device=device, dense=dense)
    step(nabla)
    found, pooled = None, nabla.pooled
    for _ in range(ROUNDS):
        mass = mass_of_share(pooled[:: max(1, len(pooled) // LOOKED_AT)], nabla, sparsity)
        found, pooled = measured_shares(step, NablaConfig(mass=mass, window=config.window), grid, device)
        if abs(found.mean - sparsity) < CLOSE:
            break
    return found


def mass_of_share(pooled: Pooled, nabla: NablaAttention, sparsity: float) -> float:
    """By bisection over all these attentions together."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        dropped = sum(dropped_share(q, k, nabla, middle) for q, k in pooled) / len(pooled)
        low, high = (middle, high) if dropped > sparsity else (low, middle)
    return max(LEAST_MASS, (low + high) / 2)


def dropped_share(q: Tensor, k: Tensor, nabla: NablaAttention, mass: float | None = None) -> float:
    """Of the blocks, for pooled queries and keys; `mass` instead of NABLA's own."""
    kept = pooled_mass_mask(q, k, nabla.config.mass if mass is None else mass) | nabla.window
    return 1 - float(kept.mean(dtype=torch.float32))
