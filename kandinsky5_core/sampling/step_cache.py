"""MagCache: a step whose change is small reuses what the visual blocks added to the tokens in an earlier one.

What the blocks add (their residual) keeps its direction over many steps and changes in length by a ratio that depends
on the model and hardly on the prompt (arXiv 2506.09045). So ratios measured once say how far off an old residual is:

    ratio   = |residual now| / |residual when the blocks last ran|, from the table
    error  += |1 - ratio|
    skip while error < threshold, and at most max_skip times in a row; then the blocks run and error is 0 again

Everything lives in a `MagCache`, made for one run: nothing is left over after a cancel or an error. The DiT does not
know of it; `around` replaces the call of its visual blocks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..config import Variant
from ..dit.model import AroundBlocks, VisualBlocks
from ..dit.plan import VisualPlan

CACHES = ("off", "magcache")
POSITIVE, NEGATIVE = 0, 1
"""Sides of guidance: each has ratios and residuals of its own."""
FEW_STEPS = 16
"""Checkpoints made for up to this many steps change too much in each: no cache."""
KEPT_STEPS = 2
"""A part that was not evaluated for longer is forgotten."""


@dataclass(frozen=True, kw_only=True)
class MagSettings:
    """How much may be skipped; the defaults are the official ones."""

    threshold: float = 0.12
    """Error that the skipped steps in a row may add up to; 0 skips nothing."""
    max_skip: int = 2
    """Skipped steps in a row."""
    retain: float = 0.2
    """Share of the run, from its beginning, that is always computed."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"cache_threshold must be at least 0, got {self.threshold}; 0.12 is official")
        if self.max_skip < 0:
            raise ValueError(f"cache_max_skip must be at least 0, got {self.max_skip}; 2 is official")
        if not 0 <= self.retain <= 1:
            raise ValueError(f"cache_retain must be in 0 to 1, got {self.retain}; 0.2 is official")


@dataclass(frozen=True, kw_only=True)
class CacheRatios:
    """How the length of the residual changes from step to step, measured over one whole run of `steps` steps."""

    variant: str
    shift: float
    """Of the schedule of that run."""
    conditional: tuple[float, ...]
    """Length in step i+1 over length in step i, (steps - 1) values."""
    unconditional: tuple[float, ...] | None = None
    """The same in the negative pass; None where guidance was off, and then `conditional` serves both."""
    source: str = "released"
    """Where they come from, for people."""

    def __post_init__(self) -> None:
        for name, values in (("conditional", self.conditional), ("unconditional", self.unconditional)):
            if values is None:
                continue
            if len(values) != len(self.conditional) or len(values) < 2:
                raise ValueError(f"cache ratios: {len(values)} {name} values; expected as many of both, at least 2")
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"cache ratios: {name} values must be positive numbers")
        if not self.shift > 0:
            raise ValueError(f"cache ratios: shift must be positive, got {self.shift}")

    @property
    def steps(self) -> int:
        return len(self.conditional) + 1

    @cached_property
    def _curves(self) -> tuple[list[float], list[float]]:
        return _log_curve(self.conditional), _log_curve(self.unconditional or self.conditional)

    def log_length(self, sigma: float, side: int) -> float:
        """Logarithm of the residual's length at a noise level, over that at the first step.

        Interpolated over noise levels: the measured ratios are multiplied up to a curve of `steps` points, each at the
        level where its step stood, and the curve is straight in the logarithm between them and beyond the last. So a
        run with half as many steps gets the products of two ratios, one with another shift, fewer or more steps, a
        later start or steps between the steps gets what belongs to its levels, and one like the measured run gets
        the measured ratios.
        """
        curve = self._curves[side]
        position = max(0.0, self.steps * (1 - _unshifted(sigma, self.shift)))
        # Sigmas are fp32: keep the points of the table where they are.
        position = round(position) if abs(position - round(position)) < 1e-4 else position
        left = min(int(position), len(curve) - 2)
        return curve[left] + (position - left) * (curve[left + 1] - curve[left])


def _log_curve(ratios: Sequence[float]) -> list[float]:
    curve = [0.0]
    for ratio in ratios:
        curve.append(curve[-1] + math.log(ratio))
    return curve


def _unshifted(sigma: float, shift: float) -> float:
    """The level that `schedule.shifted` warps to `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


@dataclass
class SkipRule:
    """The rule for one side of one run, without tensors: which evaluations are skipped is known beforehand."""

    ratios: CacheRatios
    settings: MagSettings
    sigmas: Sequence[float]
    """The run's schedule, noise first."""
    side: int = POSITIVE
    error: float = 0.0
    skipped: int = 0
    computed_at: float | None = None
    """log_length where the blocks last ran; None before the first time."""

    def skips(self, sigma: float) -> bool:
        """Whether the evaluation at this level reuses the residual. Call it once for each, in order."""
        now = self.ratios.log_length(sigma, self.side)
        if self.computed_at is not None and not self._retained(sigma):
            self.error += abs(1 - math.exp(now - self.computed_at))
            self.skipped += 1
            if self.error < self.settings.threshold and self.skipped <= self.settings.max_skip:
                return True
        self._computed(now)
        return False

    def _computed(self, log_length: float) -> None:
        self.error, self.skipped, self.computed_at = 0.0, 0, log_length

    def _retained(self, sigma: float) -> bool:
        """Counted as officially: evaluations of both sides in turn, the share rounded down."""
        num_steps = len(self.sigmas) - 1
        return 2 * step_at(self.sigmas, sigma) + self.side < int(2 * num_steps * self.settings.retain)


def step_at(sigmas: Sequence[float], sigma: float) -> int:
    """Index of the step that an evaluation at `sigma` belongs to: the first whose level is not above it."""
    return bisect_left(sigmas, -sigma * (1 + 1e-6), key=lambda level: -level)


@dataclass
class CacheCounts:
    """How often the blocks were asked for, and skipped, over all runs of one call."""

    evaluations: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        return self.skipped / self.evaluations if self.evaluations else 0.0


class StepCache(Protocol):
    """What stands between guidance and the DiT's visual blocks in one run."""

    def around(
        self, sigma: float, sides: Sequence[int] = (POSITIVE,), keys: Sequence[Hashable] | None = None
    ) -> AroundBlocks:
        """What to call instead of the blocks in the evaluation at `sigma`.

        Args:
            sides: Of guidance, one for each equal part of the batch.
            keys: Names of the parts, where a side has several (areas, windows); else the sides.
        """
        ...


NewCache = Callable[[Sequence[float]], StepCache]
"""Makes the cache of one run from its sigmas."""


@dataclass
class _Part:
    rule: SkipRule
    step: int = 0
    """In which it was last evaluated."""
    residual: Tensor | None = None


@dataclass
class MagCache:
    """The cache of one run."""

    ratios: CacheRatios
    settings: MagSettings
    sigmas: Sequence[float]
    counts: CacheCounts = field(default_factory=CacheCounts)
    parts: dict[Hashable, _Part] = field(default_factory=dict)

    def around(
        self, sigma: float, sides: Sequence[int] = (POSITIVE,), keys: Sequence[Hashable] | None = None
    ) -> AroundBlocks:
        """As in `StepCache`."""
        parts = self._parts(step_at(self.sigmas, sigma), sides, keys or sides)

        def cached(
            blocks: VisualBlocks, tokens: Tensor, text: Tensor, time_embed: Tensor, plan: VisualPlan,
            text_mask: Tensor | None,
        ) -> Tensor:  # fmt: skip
            rows = len(tokens) // len(parts)
            skips = [self._skips(part, sigma, (rows, *tokens.shape[1:])) for part in parts]
            if not any(skips):
                made = blocks(tokens, text, time_embed, plan, text_mask)
                for part, residual in zip(parts, (made - tokens).split(rows), strict=True):
                    part.residual = residual
                return made
            pieces = []
            for number, (part, skip) in enumerate(zip(parts, skips, strict=True)):
                at = slice(number * rows, (number + 1) * rows)
                if skip:
                    pieces.append(tokens[at] + part.residual.to(tokens.device))
                    continue
                mask = None if text_mask is None else text_mask[at]
                pieces.append(blocks(tokens[at], text[at], time_embed[at], plan, mask))
                part.residual = pieces[-1] - tokens[at]
            return torch.cat(pieces)

        return cached

    def _parts(self, step: int, sides: Sequence[int], keys: Sequence[Hashable]) -> list[_Part]:
        """The parts of this evaluation; windows that move from step to step must not pile up, so old ones go."""
        self.parts = {key: part for key, part in self.parts.items() if step - part.step <= KEPT_STEPS}
        found = []
        for side, key in zip(sides, keys, strict=True):
            part = self.parts.setdefault(key, _Part(SkipRule(self.ratios, self.settings, self.sigmas, side)))
            part.step = step
            found.append(part)
        return found

    def _skips(self, part: _Part, sigma: float, shape: tuple[int, ...]) -> bool:
        if part.residual is None or part.residual.shape != shape:
            part.rule.computed_at = None
        skips = part.rule.skips(sigma)
        self.counts.evaluations += 1
        self.counts.skipped += skips
        return skips


def predicted_counts(
    ratios: CacheRatios, settings: MagSettings, sigmas: Sequence[float], *, guided: bool
) -> CacheCounts:
    """What a run with one evaluation a step will skip: known before it starts."""
    rules = [SkipRule(ratios, settings, sigmas, side) for side in ((POSITIVE, NEGATIVE) if guided else (POSITIVE,))]
    skips = [rule.skips(sigma) for sigma in sigmas[:-1] for rule in rules]
    return CacheCounts(len(skips), sum(skips))


def why_off(variant: Variant, ratios: CacheRatios | None) -> str | None:
    """Why MagCache cannot serve a variant, and what to do; None where it can."""
    if variant.sampling.num_steps <= FEW_STEPS:
        return f"{variant.name} is distilled to {variant.sampling.num_steps} steps, each of which changes too much"
    if ratios is None:
        return (
            f"no ratios are known for {variant.name}; measure them once with `kandinsky5 generate --calibrate-cache`, "
            "or in ComfyUI with mode calibrate of the Step Cache node"
        )
    return None
