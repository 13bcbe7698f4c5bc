"""The average of LoRAs: of what they add to the weights, exactly.

The mean of s_i * up_i @ down_i over parts i with shares w_i is one pair again: all down matrices on top of each other,
and all w_i * s_i * up_i side by side. Its rank is the sum of the ranks; a smaller one is found by SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .lora_files import lora_format, read_any, without_alpha, write_pairs
from .low_rank import lora_deltas, truncated_product

Pairs = dict[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True, kw_only=True)
class LoraSoup:
    """LoRAs of one base, and their shares."""

    pairs: tuple[Pairs, ...]
    """By module, of each part."""
    shares: tuple[float, ...]
    wanted: int | None
    """Rank of the result; None: as many as it takes."""
    layout: str

    @classmethod
    def of(cls, paths: Sequence[Path], shares: Sequence[float], rank: int | None) -> LoraSoup:
        """Open the files; matrices stay in them until they are written.

        Raises:
            ValueError: a file is no LoRA, they are not siblings, or the rank is below 1.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        pairs = []
        for path in paths:
            found, _ = read_any(path)
            if found.unmatched:
                raise ValueError(
                    f"{Path(path).name} holds {len(found.unmatched)} tensors that are no part of a LoRA of "
                    f"Kandinsky 5, such as {found.unmatched[0]}, and would be lost in a soup"
                )
            pairs.append(lora_deltas(found))
        check_lora_siblings(paths, pairs)
        return cls(pairs=tuple(pairs), shares=tuple(shares), wanted=rank, layout=lora_format(paths[0]))

    @property
    def rank(self) -> int:
        """The largest of the result."""
        return max(shape[0] for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(rank, in, out) of the result by module."""
        found = {}
        for module, (down, up, _) in self.pairs[0].items():
            rank = sum(len(part[module][0]) for part in self.pairs)
            if self.wanted is not None:
                rank = min(rank, self.wanted, down.shape[1], len(up))
            found[module] = (rank, down.shape[1], len(up))
        return found

    def write(self, target: Path, metadata: Mapping[str, str], on_tensor: Callable[[int, int], None] | None) -> float:
        """Write the average under the first part's key names; which part of it the rank keeps (1: all)."""
        kept, whole = 0.0, 0.0
        shapes = self.shapes()

        def pair_of(module: str) -> tuple[Tensor, Tensor, float]:
            nonlocal kept, whole
            down, up = self.joined(module)
            if shapes[module][0] < len(down):
                small = truncated_product(down, up, shapes[module][0])
                kept, whole = kept + small.kept, whole + small.whole
                return small.down, small.up, 1.0
            energy = float(((up.T @ up) * (down @ down.T)).sum())
            kept, whole = kept + energy, whole + energy
            return down, up, 1.0

        metadata = {**without_alpha(metadata), "rank": str(self.rank)}
        dtypes = {module: down.dtype for module, (down, _, _) in self.pairs[0].items()}
        write_pairs(target, shapes, pair_of, self.layout, metadata, dtypes=dtypes, on_tensor=on_tensor)
        return kept / whole if whole else 1.0

    def joined(self, module: str) -> tuple[Tensor, Tensor]:
        """Down (R, in) and up (out, R), fp32, whose product is the average at scale 1."""
        downs = [part[module][0].float() for part in self.pairs]
        ups = [
            part[module][1].float() * (share * part[module][2])
            for part, share in zip(self.pairs, self.shares, strict=True)
        ]
        return torch.cat(downs), torch.cat(ups, dim=1)


def check_lora_siblings(paths: Sequence[Path], pairs: Sequence[Pairs]) -> None:
    """That LoRAs move the same layers of models of one size; ranks may differ.

    Raises:
        ValueError: names the files and the first difference.
    """
    first = pairs[0]
    for path, other in zip(paths[1:], pairs[1:], strict=True):
        names = f"{Path(paths[0]).name} and {Path(path).name} are no siblings"
        missing = sorted(first.keys() ^ other.keys())
        if missing:
            raise ValueError(f"{names}: only one of them has {missing[0]}")
        for module, (down, up, _) in first.items():
            sizes = (len(up), down.shape[1]), (len(other[module][1]), other[module][0].shape[1])
            if sizes[0] != sizes[1]:
                raise ValueError(f"{names}: {module} is {sizes[0]} and {sizes[1]}")
