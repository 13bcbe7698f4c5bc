"""MagCache ratios of the released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import variant
from .step_cache import CacheRatios

TABLES = Path(__file__).with_name("released_ratios.json")
UNIT = 1e-5


def released_ratios(name: str) -> CacheRatios | None:
    """The official ratios of a variant; None where there are none.

    They were measured over 50 steps; the shift is taken to be the variant's own, which the official files do not say.
    """
    table = _tables().get(name)
    if table is None:
        return None
    sides = {side: tuple(UNIT * value for value in values) for side, values in table.items()}
    return CacheRatios(variant=name, shift=variant(name).sampling.shift, **sides)


def released_names() -> list[str]:
    """Variants that have official ratios."""
    return list(_tables())


def _tables() -> dict[str, dict[str, list[int]]]:
    return json.loads(TABLES.read_text(encoding="utf-8"))["tables"]
