"""Training material as examples: from folders with captions beside the files, or from tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, SourceConfig

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
TABLES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("path", "file", "file_name", "image", "video", "target")
CAPTION_COLUMNS = ("caption", "text", "prompt", "instruction")
SOURCE_COLUMNS = ("source", "before", "source_image")
BEFORE, AFTER = ("source", "before"), ("target", "after")
"""Names of the two folders, or the two endings of file names, of edit pairs."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture, clip or edit, as the user gave it."""

    path: Path
    """For an edit, the picture after it."""
    kind: str
    """'image', 'clip' or 'edit'."""
    caption: str
    """As written; the instruction of an edit. Empty where there is none."""
    source: Path | None = None
    """The picture before an edit."""
    domain: str = ""
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that will not be trained on, and why."""

    path: Path
    reason: str


def read_sources(data: DataConfig) -> tuple[list[Example], list[Problem]]:
    """Everything that the sources name, in a stable order.

    Raises:
        ValueError: a source is not there, or a table lacks a column or cannot be read.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for source in data.sources:
        root = Path(source.path).expanduser()
        if root.is_dir():
            found, bad = _read_folder(root, source)
        elif root.suffix.lower() in TABLES and root.is_file():
            found, bad = _read_table(root, source)
        else:
            what = "does not exist" if not root.exists() else f"is neither a folder nor one of {', '.join(TABLES)}"
            raise ValueError(f"training material {root} {what}")
        examples += found
        problems += bad
    return examples, problems


def _read_folder(root: Path, source: SourceConfig) -> tuple[list[Example], list[Problem]]:
    examples, problems = [], []
    found = [path for path in sorted(root.rglob("*")) if not _is_hidden(path, root) and _kind(path)]
    by_key = {_key(path.parent, path.stem): path for path in reversed(found) if _kind(path) == "image"}
    for path in found:
        side = _side(path, root)
        partner = by_key.get(_partner_key(path, side)) if side else None
        if side and partner is None:
            where, lack = ("before", "one after it") if side == "before" else ("after", "one before it")
            problems.append(Problem(path=path, reason=f"the picture {where} an edit, without {lack}"))
        if side == "before" or (side and partner is None):
            continue
        examples.append(
            Example(
                path=path, kind="edit" if partner else _kind(path) or "", caption=_caption_beside(path, partner),
                source=partner, domain=source.domain or _domain(path, root), repeats=source.repeats,
            )
        )  # fmt: skip
    return examples, problems


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if not path.is_file():
        return None
    return "image" if suffix in IMAGES else "clip" if suffix in CLIPS else None


def _side(path: Path, root: Path) -> str | None:
    """'before' or 'after' where the end of the name or the folder says so; `root` may be called as it likes."""
    if path.suffix.lower() not in IMAGES:
        return None
    folder = path.parent.name.lower() if path.parent != root else ""
    for side, names in (("before", BEFORE), ("after", AFTER)):
        if folder in names or path.stem.lower().endswith(tuple(f"_{name}" for name in names)):
            return side
    return None


def _key(folder: Path, stem: str) -> tuple[Path, str, str]:
    """Of a picture, whatever its suffix and capitals."""
    return folder.parent, folder.name.lower(), stem.lower()


def _partner_key(path: Path, side: str) -> tuple[Path, str, str]:
    """Of the other picture of an edit pair."""
    mine, theirs = (AFTER, BEFORE) if side == "after" else (BEFORE, AFTER)
    for own, other in zip(mine, theirs, strict=True):
        if path.stem.lower().endswith(f"_{own}"):
            return _key(path.parent, path.stem[: -len(own)] + other)
        if path.parent.name.lower() == own:
            return _key(path.parent.parent / other, path.stem)
    raise AssertionError(path)


def _caption_beside(path: Path, before: Path | None) -> str:
    """The text file of the same name; for edits also above the two folders, or under the name without its ending."""
    texts = [path.with_suffix(".txt"), path.parent / f"{path.name}.txt"]
    if before is not None:
        stem, _, ending = path.stem.rpartition("_")
        if before.parent == path.parent and ending.lower() in AFTER:
            texts.append(path.parent / f"{stem}.txt")
        else:
            texts.append(path.parent.parent / f"{path.stem}.txt")
        texts.append(before.with_suffix(".txt"))
    for text in texts:
        if text.is_file():
            return text.read_text(encoding="utf-8-sig", errors="replace")
    return ""


def _domain(path: Path, root: Path) -> str:
    folders = [part for part in path.relative_to(root).parts[:-1] if part.lower() not in (*BEFORE, *AFTER)]
    return folders[0] if folders else ""


def _read_table(table: Path, source: SourceConfig) -> tuple[list[Example], list[Problem]]:
    examples, problems = [], []
    for number, row in enumerate(_rows(table), 1):
        name = _value(row, PATH_COLUMNS)
        if name is None:
            raise ValueError(
                f"{table}, row {number}: nothing in a column of {', '.join(PATH_COLUMNS)}; the columns are "
                f"{', '.join(map(str, row))}"
            )
        path = table.parent / name
        before = _value(row, SOURCE_COLUMNS)
        kind = _kind(path)
        if kind is None:
            reason = "unknown kind of file" if path.is_file() else f"named in {table.name} and not there"
            problems.append(Problem(path=path, reason=reason))
            continue
        examples.append(
            Example(
                path=path, kind="edit" if before else kind, caption=_value(row, CAPTION_COLUMNS) or "",
                source=table.parent / before if before else None,
                domain=source.domain or _value(row, ("domain",)) or "", repeats=source.repeats,
            )
        )  # fmt: skip
    return examples, problems


def _rows(table: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table as objects.

    Raises:
        ValueError: it cannot be read, or needs a package that is not there.
    """
    read = {".parquet": _parquet_rows, ".csv": _csv_rows, ".jsonl": _json_rows}[table.suffix.lower()]
    try:
        yield from read(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}; save it as UTF-8 text") from error


def _parquet_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{table} needs pyarrow: pip install pyarrow; or give a .jsonl or .csv table") from error
    try:
        yield from parquet.read_table(table).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{table} is no parquet table that can be read: {error}") from error


def _csv_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    with table.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _json_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    with table.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{table}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number}: expected an object with keys, got {line.strip()[:60]}")
            yield row


def _value(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    return None
