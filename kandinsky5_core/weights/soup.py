"""Model soups (report section 6.4): the average of fine-tunes of one base, tensor by tensor from file to file.

Memory holds one tensor of each input, so 19B checkpoints merge on any machine. LoRAs are averaged by what they add to
the weights (`lora_soup.py`): the mean of their matrices would be something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .container import WeightsError
from .load import check_dtypes, read_tensors
from .lora import BASE_KEY, SAMPLES_KEY, is_lora
from .lora_soup import LoraSoup
from .lora_tools import check_target
from .source import WeightsSource, open_source
from .stream import StreamWriter, planned

WEIGHTINGS = ("equal", "size", "sqrt")
SOUP_KEY = "kandinsky5.soup"
"""Metadata of a soup: its parts and their shares."""

OnTensor = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One fine-tune."""

    path: Path
    size: float | None = None
    """Training samples of its domain, for the weightings 'size' and 'sqrt'; None: not known."""

    @classmethod
    def of(cls, path: Path, size: float | None = None) -> Part:
        """With the size that the file tells, where none is given."""
        told = open_source(path).metadata.get(SAMPLES_KEY) if size is None else None
        return cls(path=Path(path), size=size if told is None else float(told))

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name


@dataclass(frozen=True, kw_only=True)
class Soup:
    """What was written."""

    shares: dict[str, float]
    """By the path of each part; they add up to 1."""
    size: float | None
    """Samples of all parts together: the soup's size as a part of another; None where one is not known."""
    kind: str
    """'model' or 'lora'."""
    rank: int | None = None
    """Of a LoRA."""
    kept: float = 1.0
    """Which part of the exact average the rank of a LoRA keeps, of squared norms."""


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


def shares_of(names: Sequence[str], sizes: Sequence[float | None], weighting: str) -> list[float]:
    """`soup_weights` of sizes that may be unknown.

    Raises:
        ValueError: as there; also where the weighting needs a size that is not known.
    """
    for name, size in zip(names, sizes, strict=True):
        if size is None and weighting in ("size", "sqrt"):
            raise ValueError(
                f"weighting '{weighting}' needs the samples of each part, and {name} does not tell its own; give them "
                "as its size, or weigh equally"
            )
    return soup_weights([1.0 if size is None else size for size in sizes], weighting)


def total_size(sizes: Sequence[float | None]) -> float | None:
    """All samples; None where some are not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def soup(
    parts: Sequence[Part],
    target: Path,
    *,
    weighting: str = "equal",
    rank: int | None = None,
    on_tensor: OnTensor | None = None,
) -> Soup:
    """Write the weighted average of models, or of LoRAs, to `target`.

    Args:
        rank: Of the result where the parts are LoRAs; None: the ranks of the parts added up, which is exact.

    Raises:
        ValueError: the parts are not siblings: other keys, shapes or base models.
    """
    shares = shares_of([part.name for part in parts], [part.size for part in parts], weighting)
    return write_soup(list(zip(parts, shares, strict=True)), target, rank=rank, on_tensor=on_tensor)


def write_soup(
    shared: Sequence[tuple[Part, float]], target: Path, *, rank: int | None = None, on_tensor: OnTensor | None = None
) -> Soup:
    """The same with given shares, which add up to 1.

    The result keeps the first part's dtypes and the metadata that all parts share; sums are in fp32. The file appears
    when it is complete; what `on_tensor(done, total)` raises leaves none.
    """
    paths = [part.path for part, _ in shared]
    _check_paths(paths, target)
    sources = [open_source(path) for path in paths]
    shares = [share for _, share in shared]
    size = total_size([part.size for part, _ in shared])
    metadata = soup_metadata(sources, shares, size)
    told = {str(path): round(share, 6) for path, share in zip(paths, shares, strict=True)}
    loras = [source for source in sources if is_lora(source)]
    if loras and len(loras) < len(sources):
        other = next(source for source in sources if source not in loras)
        raise ValueError(f"{loras[0].path.name} is a LoRA and {other.path.name} a whole model; mix files of one kind")
    if rank is not None and not loras:
        raise ValueError("rank is for soups of LoRAs; leave it out for whole models")
    check_bases(sources)
    if loras:
        made = LoraSoup.of(paths, shares, rank)
        kept = made.write(Path(target), metadata, on_tensor)
        return Soup(shares=told, size=size, kind="lora", rank=made.rank, kept=round(kept, 6))
    check_siblings(sources)
    _write_models(sources, shares, Path(target), metadata, on_tensor)
    return Soup(shares=told, size=size, kind="model")


def _write_models(
    sources: Sequence[WeightsSource], shares: Sequence[float], target: Path, metadata: Mapping[str, str],
    on_tensor: OnTensor | None,
) -> None:  # fmt: skip
    plan = planned(sources[0].tensors)
    with StreamWriter(target, plan, metadata) as writer:
        for number, name in enumerate(plan, 1):
            tensors = [read_tensors({name: source.tensors[name]})[name] for source in sources]
            writer.write(name, average(tensors, shares))
            if on_tensor is not None:
                on_tensor(number, len(plan))


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean in the first one's dtype, for shares that add up to 1.

    As the first and its differences from the others, so that what no fine-tune moved stays bit for bit.
    """
    first = tensors[0].float()
    total = first.clone()
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor.float() - first, alpha=share)
    return total.to(tensors[0].dtype)


def soup_metadata(sources: Sequence[WeightsSource], shares: Sequence[float], size: float | None) -> dict[str, str]:
    """What all parts say, their base and trigger words, and what the soup is made of."""
    first = sources[0].metadata
    metadata = {
        key: value for key, value in first.items() if all(source.metadata.get(key) == value for source in sources)
    }
    bases = [source.metadata[BASE_KEY] for source in sources if BASE_KEY in source.metadata]
    triggers = list(dict.fromkeys(filter(None, (source.metadata.get("trigger", "") for source in sources))))
    listed = ", ".join(f"{source.path.name} {share:.4f}" for source, share in zip(sources, shares, strict=True))
    told = {
        BASE_KEY: bases[0] if bases else "",
        "trigger": ", ".join(triggers),
        SOUP_KEY: listed,
        SAMPLES_KEY: "" if size is None else f"{size:.12g}",
    }
    kept = {key: value for key, value in metadata.items() if key not in told}
    return {**kept, **{key: value for key, value in told.items() if value}}


def check_siblings(sources: Sequence[WeightsSource]) -> None:
    """That whole models hold the same tensors and began from the same base, where they say.

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
    check_bases(sources)
    for source in sources:
        try:
            check_dtypes(source.tensors)
        except WeightsError as error:
            raise ValueError(f"{source.path.name}: {error}") from error


def check_bases(sources: Sequence[WeightsSource]) -> None:
    """That files began from the same base, where they say.

    Raises:
        ValueError: names the files and their bases.
    """
    bases = {source.path.name: source.metadata[BASE_KEY] for source in sources if BASE_KEY in source.metadata}
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name} from {base}" for name, base in bases.items())
        raise ValueError(f"the models are fine-tunes of different bases: {told}")


def _check_paths(paths: Sequence[Path], target: Path) -> None:
    resolved = [Path(path).resolve() for path in paths]
    twice = [path for path in resolved if resolved.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0].name} is given twice; give each part once")
    for path in paths:
        if Path(path).exists():
            check_target(target, path)
