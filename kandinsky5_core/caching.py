"""The step cache that a request asks for: its ratios found, its runs counted, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .config import Variant
from .request import Request
from .sampling.step_cache import CacheCounts, CacheRatios, MagCache, MagSettings, why_off
from .weights.cache_ratios import find_ratios


@dataclass(frozen=True, kw_only=True)
class ChosenCache:
    """A cache for every run of one call."""

    settings: MagSettings
    ratios: CacheRatios | None
    off: str | None
    """Why there is none, for the user."""
    counts: CacheCounts = field(default_factory=CacheCounts)

    def start(self, sigmas: Sequence[float]) -> MagCache:
        """The cache of one run."""
        assert self.ratios is not None
        return MagCache(self.ratios, self.settings, sigmas, self.counts)

    def told(self) -> dict[str, object]:
        """What it came to, as plain values."""
        if self.off is not None:
            return {"off": self.off}
        assert self.ratios is not None
        return {
            "ratios": f"{self.ratios.source}: {self.ratios.variant}, {self.ratios.steps} steps",
            "evaluations": self.counts.evaluations,
            "skipped": self.counts.skipped,
            "skipped_share": round(self.counts.share, 3),
        }


def choose_cache(request: Request, variant: Variant, weights: Path | None) -> ChosenCache | None:
    """The cache of a resolved request; None where it asks for none.

    Args:
        weights: The DiT's file or folder, beside which calibrated ratios may lie.

    Raises:
        ValueError: the file of ratios that was named cannot be used.
    """
    if request.cache == "off":
        return None
    ratios = find_ratios(variant, weights, request.cache_ratios)
    return ChosenCache(settings=request.cache_settings(), ratios=ratios, off=why_off(variant, ratios))
