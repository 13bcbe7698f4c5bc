"""Soups in levels (report section 6.4.1): subdomains into domains, domains into the final model.

Weights multiply through the levels, so a nested soup is a flat one with product weights: nothing is written in between,
and every value is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .soup import WEIGHTINGS, OnTensor, Part, Soup, shares_of, total_size, write_soup
from .source import read_json

RECIPE = """{"weighting": "equal", "parts": [
  {"name": "animals", "weighting": "sqrt", "parts": [
    {"file": "animals/cats.safetensors", "size": 1200}, {"file": "animals/dogs.safetensors", "size": 300}]},
  {"file": "nature.safetensors", "size": 5000}]}"""
"""What a recipe looks like."""
_GROUP_KEYS, _PART_KEYS = {"name", "weighting", "parts"}, {"file", "size"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Fine-tunes, or groups of them, that are averaged among themselves first."""

    name: str
    parts: tuple[Part | Group, ...]
    weighting: str = "equal"

    @property
    def size(self) -> float | None:
        """Samples of all that is in it; None where some are not known."""
        return total_size([part.size for part in self.parts])


def nested_soup(
    group: Group, target: Path, *, rank: int | None = None, on_tensor: OnTensor | None = None
) -> Soup:
    """Write the soup of a tree of fine-tunes.

    Raises:
        ValueError: as `soup`; also for an empty group.
    """
    return write_soup(flat_shares(group), target, rank=rank, on_tensor=on_tensor)


def flat_shares(group: Group) -> list[tuple[Part, float]]:
    """Every fine-tune of the tree with its share in the whole: the product of the shares on its way up."""
    if not group.parts:
        raise ValueError(f"'{group.name}' holds no model")
    found = []
    shares = shares_of([part.name for part in group.parts], [part.size for part in group.parts], group.weighting)
    for part, share in zip(group.parts, shares, strict=True):
        below = flat_shares(part) if isinstance(part, Group) else [(part, 1.0)]
        found += [(leaf, share * own) for leaf, own in below]
    return found


def read_recipe(path: Path) -> Group:
    """The tree that a JSON file describes (see `RECIPE`); file names are relative to it.

    Raises:
        ValueError: not JSON, or not a recipe; says where.
    """
    return _group(read_json(path), Path(path).parent, Path(path).name)


def _group(values: Mapping[str, Any], folder: Path, where: str) -> Group:
    if not isinstance(values, Mapping) or not isinstance(values.get("parts"), list) or not values["parts"]:
        raise ValueError(f"{where}: expected an object with a list of parts, such as {RECIPE}")
    _check_keys(values, _GROUP_KEYS, where)
    weighting = values.get("weighting", "equal")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{where}: weighting '{weighting}' is unknown; use one of {', '.join(WEIGHTINGS)}")
    parts: list[Part | Group] = []
    for number, entry in enumerate(values["parts"], 1):
        below = f"{where}, part {number}"
        if isinstance(entry, Mapping) and "parts" in entry:
            parts.append(_group(entry, folder, f"{below} ({entry.get('name', 'no name')})"))
        else:
            parts.append(_part(entry, folder, below))
    return Group(name=str(values.get("name", where)), parts=tuple(parts), weighting=weighting)


def _part(entry: Any, folder: Path, where: str) -> Part:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
        raise ValueError(f'{where}: expected {{"file": NAME, "size": SAMPLES}} or an object with parts, got {entry!r}')
    _check_keys(entry, _PART_KEYS, where)
    size = entry.get("size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | float)):
        raise ValueError(f"{where}: size {size!r} is no number of samples")
    return Part.of(folder / entry["file"], None if size is None else float(size))


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{where}: '{unknown[0]}' is unknown; use {', '.join(sorted(known))}")


def group_of_folder(folder: Path, *, weighting: str = "equal", within: str = "sqrt") -> Group:
    """The tree of a folder: `<domain>.safetensors`, or `<domain>/<subdomain>.safetensors`; sizes from the files.

    Args:
        weighting: Of the domains.
        within: Of the subdomains of each; the report takes the square root of their sizes.

    Raises:
        ValueError: no folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with <domain>/<subdomain>.safetensors")
    parts: list[Part | Group] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            files = sorted(path.rglob("*.safetensors"))
            below = tuple(Part.of(file) for file in files)
            parts += [Group(name=path.name, parts=below, weighting=within)] if below else []
        elif path.suffix == ".safetensors":
            parts.append(Part.of(path))
    if not parts:
        raise ValueError(f"{folder} holds no <domain>.safetensors and no <domain>/<subdomain>.safetensors")
    return Group(name=folder.name, parts=tuple(parts), weighting=weighting)


def check_outside(target: Path, folder: Path) -> None:
    """Refuse a result within the tree, of which it would be a part the next time.

    Raises:
        ValueError: it is there.
    """
    if Path(target).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{Path(target).name} would lie in {folder.name}, as one more part; write it elsewhere")
