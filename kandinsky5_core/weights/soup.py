"""Model soups (report section 6.4): the average of fine-tunes of one base, tensor by tensor from file to file.

Memory holds one tensor of each input, so 19B checkpoints merge on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .container import WeightsError
from .load import check_dtypes, read_tensors
from .source import WeightsSource, open_source
from .stream import StreamWriter, planned

WEIGHTINGS = ("equal", "size", "sqrt")
BASE_KEY = "kandinsky5.base"
"""Metadata of a fine-tune: the content hash of the model it began from."""

OnTensor = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One fine-tune."""

    path: Path
    size: float = 1.0
    """Training samples of its domain; used by the weightings 'size' and 'sqrt'."""


def soup_weights(sizes: Sequence[float], weighting: str) -> list[float]:
    """Shares of the parts, adding up to 1.

    Args:
        weighting: 'equal'; 'size', by the samples of each domain; 'sqrt', by their square roots.

    Raises:
        ValueError: unknown weighting, no part, or a size that is not positive.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting '{weighting}' is unknown; use one of {', '.join(WEIGHTINGS)}")
    if not sizes:
        raise ValueError("a soup needs at least one model")
    if not all(size > 0 and math.isfinite(size) for size in sizes):
        raise ValueError(f"sizes {list(sizes)} must be positive numbers of samples")
    raw = {"equal": [1.0] * len(sizes), "size": list(sizes), "sqrt": [math.sqrt(size) for size in sizes]}[weighting]
    return [value / sum(raw) for value in raw]


def soup(
    parts: Sequence[Part], target: Path, *, weighting: str = "equal", on_tensor: OnTensor | None = None
) -> dict[str, float]:
    """Write the weighted average of models, or of LoRAs, to `target`; the share of each file.

    The result keeps the first part's dtypes and metadata; sums are in fp32. The file appears when it is complete.

    Raises:
        ValueError: the parts are not siblings: other keys, shapes or base models.
    """
    shares = soup_weights([part.size for part in parts], weighting)
    sources = [open_source(part.path) for part in parts]
    check_siblings(sources)
    first = sources[0]
    plan = planned({name: record for name, record in first.tensors.items()})
    metadata = {**first.metadata, "kandinsky5.soup": ", ".join(
        f"{source.path.name} {share:.4f}" for source, share in zip(sources, shares, strict=True))}  # fmt: skip
    with StreamWriter(target, plan, metadata) as writer:
        for number, name in enumerate(plan, 1):
            tensors = [read_tensors({name: source.tensors[name]})[name] for source in sources]
            writer.write(name, average(tensors, shares))
            if on_tensor is not None:
                on_tensor(number, len(plan))
    return {str(part.path): round(share, 6) for part, share in zip(parts, shares, strict=True)}


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean in the first one's dtype; whole numbers are taken from the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.float(), alpha=share)
    return total.to(tensors[0].dtype)


def check_siblings(sources: Sequence[WeightsSource]) -> None:
    """That files hold the same tensors and began from the same base, where they say.

    Raises:
        ValueError: names the files and the first difference.
    """
    first = sources[0]
    for other in sources[1:]:
        missing = sorted(first.tensors.keys() ^ other.tensors.keys())
        if missing:
            raise ValueError(
                f"{first.path.name} and {other.path.name} are no siblings: only one of them has {missing[0]}"
            )
        for name, record in first.tensors.items():
            if record.shape != other.tensors[name].shape:
                shapes = f"{tuple(record.shape)} and {tuple(other.tensors[name].shape)}"
                raise ValueError(f"{first.path.name} and {other.path.name} are no siblings: {name} is {shapes}")
    bases = {source.path.name: source.metadata[BASE_KEY] for source in sources if BASE_KEY in source.metadata}
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name} from {base}" for name, base in bases.items())
        raise ValueError(f"the models are fine-tunes of different bases: {told}")
    for source in sources:
        try:
            check_dtypes(source.tensors)
        except WeightsError as error:
            raise ValueError(f"{source.path.name}: {error}") from error
