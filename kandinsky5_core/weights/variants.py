"""Which row of `VARIANTS` a DiT is, among those of its sizes: from metadata, config.json and names, in this order."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from ..config import VARIANTS, DiTConfig, Variant

VARIANT_KEY = "kandinsky5.variant"
"""Safetensors metadata key that names the variant."""
_WORDS = {
    "task": ("t2v", "i2v", "t2i", "i2i"),
    "stage": ("sft", "pretrain", "nocfg", "flash"),
    "length": ("5s", "10s"),
    "definition": ("sd", "hd"),
}
Narrow = Callable[[Variant], bool]
logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A guess and what it rests on."""

    name: str | None
    reason: str
    certain: bool
    """False where other checkpoints with these sizes exist and nothing told them apart."""


def matching_variants(config: DiTConfig) -> tuple[Variant, ...]:
    """Rows of `VARIANTS` with exactly these sizes."""
    return tuple(row for row in VARIANTS.values() if row.dit == config)


def choose_variant(
    rows: Sequence[Variant], metadata: Mapping[str, str], folder_config: Mapping[str, Any] | None, path: PurePath
) -> Choice:
    """The best guess among `rows`; a path without parts means no name is known."""
    if not rows:
        return Choice(None, "no released checkpoint has these sizes", True)
    named = metadata.get(VARIANT_KEY)
    if named in {row.name for row in rows}:
        return Choice(named, f"metadata {VARIANT_KEY}", True)
    if named is not None:
        logger.warning("metadata %s says '%s', which the tensors' sizes are not; ignored", VARIANT_KEY, named)
    if len(rows) == 1:
        return Choice(rows[0].name, "the only checkpoint with these sizes", True)
    evidence = []
    for label, narrow in (("config.json", _by_attention(folder_config)), ("name", _by_path(path))):
        kept = [row for row in rows if narrow(row)]
        if kept and len(kept) < len(rows):
            rows, evidence = kept, [*evidence, label]
    certain = len({row.files for row in rows}) == 1
    reason = " and ".join(evidence) or "sizes"
    others = f"; also possible: {', '.join(row.name for row in rows[1:])}" if len(rows) > 1 else ""
    return Choice(rows[0].name, f"by {reason}{others}", certain)


def _by_attention(folder_config: Mapping[str, Any] | None) -> Narrow:
    kind = (folder_config or {}).get("attention_type")
    if kind == "nabla":
        mass = (folder_config or {}).get("attention_P")
        return lambda row: row.nabla is not None and mass in (None, row.nabla.mass)
    return lambda row: kind is None or row.nabla is None


def _by_path(path: PurePath) -> Narrow:
    if any(_stem(path) in row.files for row in VARIANTS.values()):
        return lambda row: _stem(path) in row.files
    told = _told(path)
    return lambda row: all(_own_words(row)[category] == word for category, word in told.items())


def _stem(path: PurePath) -> str:
    return path.name.removesuffix(".safetensors")


def _told(path: PurePath) -> dict[str, str]:
    """Category -> word of the nearest part of the path that has one: the file first, then its folders."""
    told: dict[str, str] = {}
    for part in (_stem(path), *[parent.name for parent in path.parents][:4]):
        for category, word in _words(part).items():
            told.setdefault(category, word)
    return told


def _words(name: str) -> dict[str, str]:
    pieces = ["flash" if piece.startswith("distil") else piece for piece in re.split(r"[^a-z0-9]+", name.lower())]
    found = {category: [piece for piece in pieces if piece in words] for category, words in _WORDS.items()}
    return {category: hits[0] for category, hits in found.items() if hits}


def _own_words(row: Variant) -> dict[str, str]:
    defaults = {"task": row.tasks[0], "stage": "sft", "length": "5s", "definition": "sd"}
    return defaults | _words(row.name)
