"""Training material by domain, one fine-tune of a soup for each: by folder, by a table's column, or as Qwen sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from kandinsky5_core.text.classify import DOMAINS, OTHER, ask_class, check_sees_and_writes, read_class
from kandinsky5_core.text.encoder import TextEncoder

from .sources import Example

WAYS = ("folder", "column", "vlm")

FrameOf = Callable[[Example], Tensor]
"""A picture, or the middle frame of a clip: (H, W, 3), floats in 0..1 or uint8."""
Ask = Callable[[Example], str]
"""What a language model answers when it is asked for the class of an example."""
OnExample = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Material by domain."""

    domains: Mapping[str, tuple[Example, ...]]
    """By name, in order; each example has it as its domain."""
    unclear: tuple[tuple[Path, str], ...] = ()
    """Files whose answer was no class, and that answer; they are in 'other'."""
    unread: tuple[tuple[Path, str], ...] = ()
    """Files that could not be opened, and why; they are in no domain."""

    def report(self) -> str:
        """Sizes, and what went wrong."""
        lines = [f"{name}: {len(examples)}" for name, examples in self.domains.items()]
        if self.unclear:
            path, answer = self.unclear[0]
            lines.append(f"{len(self.unclear)} answers name no class and count as {OTHER}: {answer!r} for {path}")
        if self.unread:
            path, reason = self.unread[0]
            lines.append(f"{len(self.unread)} cannot be read, such as {path}: {reason}")
        return "\n".join(lines)


def split_by_domain(
    examples: Sequence[Example],
    how: str,
    *,
    ask: Ask | None = None,
    classes: Sequence[str] = DOMAINS,
    on_example: OnExample | None = None,
) -> Split:
    """The examples in their domains.

    Args:
        how: 'folder', by the first folder below the material's, else the one a file lies in; 'column', by the domain
            that its table gives it, 'other' without one; 'vlm', by what `ask` answers, 'other' where that is no class
            or several.
        on_example: Called with the number of examples done, and of all, for 'vlm'; what it raises ends the work.

    Raises:
        ValueError: unknown way, no example, or no `ask` for 'vlm'.
    """
    if how not in WAYS:
        raise ValueError(f"domains '{how}' is unknown; use {', '.join(WAYS)}")
    if not examples:
        raise ValueError("there is nothing to split into domains")
    if how == "vlm":
        if ask is None:
            raise ValueError("domains 'vlm' needs a text encoder that sees pictures and writes; give its files")
        return _asked(examples, ask, classes, on_example)
    names = [example.domain or (example.path.parent.name if how == "folder" else OTHER) for example in examples]
    return Split(domains=_grouped(zip(names, examples, strict=True)))


def asker(encoder: TextEncoder, frame_of: FrameOf, classes: Sequence[str] = DOMAINS) -> Ask:
    """Asks the model's own text encoder.

    Raises:
        ValueError: it was loaded without its head, or has no vision tower.
    """
    check_sees_and_writes(encoder)

    def ask(example: Example) -> str:
        media = "video" if example.kind == "clip" else "image"
        return ask_class(encoder, frame_of(example), classes=classes, media=media)

    return ask


def _asked(
    examples: Sequence[Example], ask: Ask, classes: Sequence[str], on_example: OnExample | None
) -> Split:
    named: list[tuple[str, Example]] = []
    unclear, unread = [], []
    for number, example in enumerate(examples, 1):
        try:
            answer = ask(example)
        except (OSError, ValueError) as error:
            unread.append((example.path, str(error)))
        else:
            found = read_class(answer, classes)
            if found is None:
                unclear.append((example.path, answer))
            named.append((found or OTHER, example))
        if on_example is not None:
            on_example(number, len(examples))
    if not named:
        path, reason = unread[0]
        raise ValueError(f"none of the {len(unread)} files can be read, such as {path}: {reason}")
    return Split(domains=_grouped(named), unclear=tuple(unclear), unread=tuple(unread))


def _grouped(named: object) -> dict[str, tuple[Example, ...]]:
    found: dict[str, list[Example]] = {}
    for name, example in named:
        found.setdefault(name, []).append(replace(example, domain=name))
    return {name: tuple(found[name]) for name in sorted(found)}


def write_tables(split: Split, folder: Path) -> dict[str, Path]:
    """A JSONL table for each domain, which a training job takes as its material; by domain.

    Paths in it are absolute. Tables of earlier splits with the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, examples in split.domains.items():
        path = folder / f"{file_name(name)}.jsonl"
        lines = [json.dumps(_row(example), ensure_ascii=False) for example in examples]
        aside = path.with_suffix(".jsonl.partial")
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        aside.replace(path)
        tables[name] = path
    return tables


def file_name(domain: str) -> str:
    """A domain's name without what file systems forbid."""
    return re.sub(r"[^\w -]", "_", domain).strip() or "_"


def _row(example: Example) -> dict[str, str]:
    row = {"path": str(example.path.resolve()), "caption": example.caption, "domain": example.domain}
    return row if example.source is None else {**row, "source": str(example.source.resolve())}
