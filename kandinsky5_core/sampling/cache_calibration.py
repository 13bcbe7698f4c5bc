"""Measuring MagCache's ratios: uncached runs that note how the length of the visual blocks' residual changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import Variant
from ..dit.model import AroundBlocks, VisualBlocks
from ..dit.plan import VisualPlan
from .schedule import flow_schedule
from .step_cache import FEW_STEPS, NEGATIVE, POSITIVE, CacheRatios, step_at

MIN_STEPS = 8
"""Fewer points make no curve."""
TOLERANCE = 2e-3
"""Of noise levels: ComfyUI takes them from a fine table."""


@dataclass
class Calibration:
    """Ratios gathered over any number of runs on one schedule."""

    shift: float
    """Of the runs' schedule."""
    sums: dict[int, dict[int, list[float]]] = field(default_factory=lambda: {POSITIVE: {}, NEGATIVE: {}})
    """Side of guidance -> step -> a ratio for each run and row."""
    num_steps: int = 0
    repeated: bool = False
    """A step was evaluated twice."""

    def start(self, sigmas: Sequence[float]) -> MeasuredRun:
        """The `StepCache` of one run; caches nothing.

        Raises:
            ValueError: too few steps, not the official schedule, or another than of the runs before.
        """
        num_steps = len(sigmas) - 1
        official = flow_schedule(max(1, num_steps), self.shift).tolist()
        if num_steps < MIN_STEPS or max(abs(a - b) for a, b in zip(sigmas, official, strict=False)) > TOLERANCE:
            raise ValueError(
                f"calibration needs a whole run of at least {MIN_STEPS} steps on the official schedule; use the "
                "model's own steps, denoise 1 and, in ComfyUI, scheduler simple"
            )
        if self.num_steps not in (0, num_steps):
            raise ValueError(f"calibration began with {self.num_steps} steps; go on with as many, not {num_steps}")
        self.num_steps = num_steps
        return MeasuredRun(self, sigmas)

    def ratios(self, variant: Variant) -> CacheRatios:
        """What the runs came to, on average.

        Raises:
            ValueError: a step was left out or evaluated twice, or nothing ran.
        """
        sides = []
        for side in (POSITIVE, NEGATIVE):
            steps = self.sums[side]
            if side == NEGATIVE and not steps:
                sides.append(None)
                continue
            complete = sorted(steps) == list(range(1, self.num_steps))
            if self.repeated or not complete or len({len(values) for values in steps.values()}) != 1:
                raise ValueError("calibration needs one evaluation in every step: use sampler euler and no other cache")
            sides.append(tuple(sum(steps[step]) / len(steps[step]) for step in range(1, self.num_steps)))
        return CacheRatios(
            variant=variant.name, shift=self.shift, conditional=sides[0], unconditional=sides[1], source="calibrated"
        )


def check_calibration(variant: Variant, *, num_steps: int, denoise: float, sampler: str) -> None:
    """That a run can measure, before it begins.

    Raises:
        ValueError: says what to change.
    """
    if variant.sampling.num_steps <= FEW_STEPS:
        raise ValueError(f"{variant.name} is distilled to {variant.sampling.num_steps} steps and takes no step cache")
    if num_steps < MIN_STEPS:
        raise ValueError(f"calibration needs at least {MIN_STEPS} steps, got {num_steps}")
    if denoise < 1:
        raise ValueError(f"calibration needs a whole run from noise; use denoise 1, not {denoise}")
    if sampler == "heun":
        raise ValueError("calibration needs one evaluation in every step; use sampler euler or ab2, not heun")


@dataclass
class MeasuredRun:
    """A `StepCache` that only looks."""

    calibration: Calibration
    sigmas: Sequence[float]
    last: dict[Hashable, tuple[int, Tensor]] = field(default_factory=dict)
    """Step and lengths of the last residual of each part, token by token."""

    def around(
        self, sigma: float, sides: Sequence[int] = (POSITIVE,), keys: Sequence[Hashable] | None = None
    ) -> AroundBlocks:
        """As in `StepCache`."""
        step = step_at(self.sigmas, sigma)

        def measured(
            blocks: VisualBlocks, tokens: Tensor, text: Tensor, time_embed: Tensor, plan: VisualPlan,
            text_mask: Tensor | None,
        ) -> Tensor:  # fmt: skip
            made = blocks(tokens, text, time_embed, plan, text_mask)
            self.note(step, made - tokens, sides, keys or sides)
            return made

        return measured

    def note(self, step: int, residual: Tensor, sides: Sequence[int], keys: Sequence[Hashable]) -> None:
        """The mean ratio of the tokens' lengths (paper, eq. 4), for each part of the batch."""
        parts = torch.linalg.vector_norm(residual.float(), dim=-1).chunk(len(keys))
        for side, key, lengths in zip(sides, keys, parts, strict=True):
            if key in self.last:
                earlier, before = self.last[key]
                self.calibration.repeated |= earlier == step
                ratio = float((lengths / before.clamp_min(1e-12)).mean())
                self.calibration.sums[side].setdefault(step, []).append(ratio)
            self.last[key] = step, lengths
