"""Calibrated MagCache ratios in a JSON file beside the weights they were measured on."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ..config import VARIANTS, Variant
from ..sampling.released_ratios import released_ratios
from ..sampling.step_cache import CacheRatios
from .hashing import sampled_hash
from .source import INDEX_SUFFIX

log = logging.getLogger(__name__)

FORMAT = "kandinsky5-magcache"
SUFFIX = ".magcache.json"
_KEYS = {"variant", "steps", "shift", "conditional", "unconditional"}


def ratios_path(weights: Path) -> Path:
    """Where the ratios of a weights file or folder are kept: `name.magcache.json` beside it, or inside the folder."""
    if weights.is_dir():
        return weights / SUFFIX.removeprefix(".")
    stem = weights.name.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors")
    return weights.with_name(stem + SUFFIX)


def check_writable(path: Path) -> None:
    """That a file can be made there; raises ValueError before a long run where it cannot."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}; name a file elsewhere: --calibrate-cache FILE")


def write_ratios(path: Path, ratios: CacheRatios, weights: Path, **facts: Any) -> None:
    """Save ratios with what they belong to; written aside, then renamed.

    Args:
        facts: More plain values for the file, such as the model's hash and the task.
    """
    values = {
        "format": FORMAT,
        "variant": ratios.variant,
        "steps": ratios.steps,
        "shift": ratios.shift,
        **facts,
        "sampled_hash": sampled_hash(weights),
        "conditional": [round(value, 5) for value in ratios.conditional],
        "unconditional": None if ratios.unconditional is None else [round(value, 5) for value in ratios.unconditional],
    }
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_ratios(path: Path, weights: Path | None = None) -> CacheRatios:
    """The ratios of a file.

    Args:
        weights: What they must have been measured on.

    Raises:
        ValueError: no such file, something else, or measured on other weights.
    """
    if not path.is_file():
        raise ValueError(f"cache ratios {path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as cache ratios ({error}); calibrate again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or not values.keys() >= _KEYS:
        raise ValueError(f"{path}: no cache ratios; expected a file that --calibrate-cache wrote")
    if weights is not None and values.get("sampled_hash") != sampled_hash(weights):
        raise ValueError(f"{path}: measured on other weights than {weights.name}; calibrate again")
    try:
        ratios = CacheRatios(
            variant=str(values["variant"]), shift=float(values["shift"]), source=path.name,
            conditional=_numbers(values["conditional"]),
            unconditional=None if values["unconditional"] is None else _numbers(values["unconditional"]),
        )  # fmt: skip
        if ratios.steps != values["steps"]:
            raise ValueError(f"cache ratios: {ratios.steps - 1} values for {values['steps']} steps")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return ratios


def _numbers(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def find_ratios(variant: Variant, weights: Path | None, named: Path | None = None) -> CacheRatios | None:
    """The ratios for a variant: of the file that was named, else beside the weights, else the released ones.

    Where one checkpoint has several rows (SD and HD), ratios measured on another row come after the released ones.

    Raises:
        ValueError: the file that was named, or the one beside the weights, cannot be used.
    """
    if named is not None:
        ratios = read_ratios(named)
        wanted = VARIANTS.get(ratios.variant)
        if wanted is not None and wanted.dit != variant.dit:
            raise ValueError(f"{named}: measured on {ratios.variant}; {variant.name} has other sizes, calibrate it")
        return ratios
    beside = None
    if weights is not None and ratios_path(weights).exists():
        try:
            beside = read_ratios(ratios_path(weights), weights)
        except ValueError as error:
            log.warning("step cache: left out: %s", error)
    if beside is not None and beside.variant == variant.name:
        return beside
    return released_ratios(variant.name) or beside
