"""What training material comes to, before any model is loaded: what is usable and what is not, and what it costs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kandinsky5_core.config import Variant
from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.media import read_image
from kandinsky5_core.shapes import VideoShape

from ..config import DataConfig
from .buckets import Bucket, bucket_sizes, choose_length, choose_size, longest_clip
from .captions import clean_caption
from .cost import Cost, estimate
from .hashing import Fingerprint, fingerprint, near_duplicates
from .sources import Example, Problem, read_sources

log = logging.getLogger(__name__)

TASK_SHARES = {
    "Video Lite": {"t2i": 0.01, "t2v": 0.79, "i2v": 0.20},
    "Video Pro": {"t2i": 0.02, "t2v": 0.77, "i2v": 0.21},
    "Image Editing": {"i2i": 0.8, "t2i": 0.2},
    "Image Lite": {"t2i": 1.0},
}
"""Probability of each task (report section 6.1)."""
NANO_FAMILIES = {"Nano Video": "Video Lite", "Nano Image": "Image Lite", "Nano Edit": "Image Editing"}
OnItem = Callable[[str], None]
"""Called with what is being looked at; may raise to cancel."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample: a picture, an edit, or a window of a clip."""

    example: Example
    caption: str
    """Cleaned, with the trigger."""
    bucket: Bucket
    moments: tuple[float, ...] = ()
    """Of a clip: seconds from its first frame, one for each frame of the bucket."""


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """The usable samples, and what is to be said of the rest."""

    variant: Variant
    items: list[Item]
    problems: list[Problem]
    duplicates: list[tuple[Path, Path]]
    """(left out, same as)."""
    num_found: int
    num_without_caption: int
    tasks: dict[str, float]
    """Probability of each task; empty where the material allows none."""
    cost: Cost
    left_out: Counter = field(default_factory=Counter)

    def check(self) -> None:
        """That there is something to train on.

        Raises:
            ValueError: no usable sample, or none that the variant can be trained on.
        """
        if not self.items:
            first = f"; the first: {self.problems[0].path}: {self.problems[0].reason}" if self.problems else ""
            raise ValueError(f"no usable sample among {self.num_found} files{first}")
        if not self.tasks:
            kinds = ", ".join(sorted({item.example.kind for item in self.items}))
            raise ValueError(
                f"{self.variant.name} cannot be trained on what there is ({kinds}): its tasks are "
                f"{', '.join(self.variant.tasks)}; t2v and i2v need clips, t2i pictures, i2i pictures before and after"
            )

    def text(self) -> str:
        """For people."""
        kinds = Counter(item.example.kind for item in self.items)
        buckets = Counter(item.bucket for item in self.items)
        domains = Counter(item.example.domain for item in self.items if item.example.domain)
        named = ", ".join(f"{name} {count}" for name, count in sorted(domains.items()))
        lines = [
            f"found {self.num_found}: {len(self.items)} samples "
            f"({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items())) or 'none usable'}), "
            f"{len(self.problems)} left out, {len(self.duplicates)} duplicates, "
            f"{self.num_without_caption} without a caption",
            "buckets: " + ", ".join(f"{bucket} {count}" for bucket, count in sorted(buckets.items())),
            "tasks: " + ", ".join(f"{task} {share:.2f}" for task, share in self.tasks.items()),
            *([f"domains: {named}"] if named else []),
            self.cost.text(),
        ]
        lines += [f"left out: {problem.path}: {problem.reason}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"and {len(self.problems) - 20} more")
        lines += [f"duplicate: {one} is like {other}" for one, other in self.duplicates[:20]]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        buckets = Counter(item.bucket for item in self.items)
        return {
            "found": self.num_found, "samples": len(self.items),
            "without_caption": self.num_without_caption,
            "problems": [{"path": str(problem.path), "reason": problem.reason} for problem in self.problems],
            "duplicates": [[str(one), str(other)] for one, other in self.duplicates],
            "buckets": {str(bucket): count for bucket, count in sorted(buckets.items())},
            "domains": dict(Counter(item.example.domain for item in self.items)),
            "tasks": self.tasks, "cost": self.cost.as_dict(),
        }  # fmt: skip


def scan(data: DataConfig, variant: Variant, *, on_item: OnItem | None = None) -> ScanReport:
    """Look at every file that the sources name.

    Args:
        on_item: Called before each file; may raise to cancel.

    Raises:
        ValueError: a source is missing or is no folder and no table.
    """
    examples, problems = read_sources(data)
    sizes = bucket_sizes(data, variant)
    longest = longest_clip(data, variant)
    items: list[Item] = []
    looks: list[tuple[Example, Fingerprint]] = []
    usable: dict[Path, list[Item]] = {}
    for number, example in enumerate(examples, 1):
        if on_item is not None:
            on_item(f"looking at {example.path.name}, {number} of {len(examples)}")
        try:
            found, look = _look(example, data, variant, sizes, longest)
        except ValueError as error:
            problems.append(Problem(path=example.path, reason=str(error)))
            continue
        usable[example.path] = found
        looks.append((example, look))
    duplicates = near_duplicates([(example.path, look) for example, look in looks])
    dropped = {one for one, _ in duplicates} if data.drop_duplicates else set()
    for example, _ in looks:
        if example.path not in dropped:
            items += usable[example.path]
    return ScanReport(
        variant=variant, items=items, problems=problems, duplicates=duplicates, num_found=len(examples),
        num_without_caption=sum(not example.caption.strip() for example, _ in looks),
        tasks=_tasks(data, variant, items), cost=estimate(items, data, variant),
    )  # fmt: skip


def _look(
    example: Example, data: DataConfig, variant: Variant, sizes: tuple[tuple[int, int], ...], longest: int
) -> tuple[list[Item], Fingerprint]:
    """The samples of one file, and what it looks like.

    Raises:
        ValueError: it cannot be used; says why.
    """
    if example.kind == "clip":
        return _look_at_clip(example, data, variant, sizes, longest)
    picture = read_image(example.path)
    pictures = [picture]
    if example.source is not None:
        pictures.append(read_image(example.source))
        if _ratio_differs(pictures[1].shape, picture.shape):
            raise ValueError(
                f"the picture before is {pictures[1].shape[1]}x{pictures[1].shape[0]} and the one after "
                f"{picture.shape[1]}x{picture.shape[0]}: not of one shape"
            )
    size = _size(picture.shape[0], picture.shape[1], data, sizes)
    bucket = Bucket(*size, 1)
    item = Item(example=example, caption=clean_caption(example.caption, data.trigger), bucket=bucket)
    return [item], fingerprint(torch.cat([part[None] for part in _same_size(pictures)]))


def _look_at_clip(
    example: Example, data: DataConfig, variant: Variant, sizes: tuple[tuple[int, int], ...], longest: int
) -> tuple[list[Item], Fingerprint]:
    if variant.vae.temporal_ratio == 1:
        raise ValueError(f"a clip, and {variant.name} makes pictures")
    footage = look_at(example.path)
    size = _size(footage.height, footage.width, data, sizes)
    available = footage.num_frames(variant.fps)
    length = choose_length(available, longest)
    if not length:
        raise ValueError(f"too short: {available} frames at {variant.fps} a second, at least 5 are needed")
    VideoShape(1, length, *size).check(variant.vae)
    # All of a long clip, as windows one after another around its middle.
    count = available // length
    first = (available - count * length) // 2
    caption = clean_caption(example.caption, data.trigger)
    items = [
        Item(
            example=example, caption=caption, bucket=Bucket(*size, length),
            moments=tuple((first + window * length + frame) / variant.fps for frame in range(length)),
        )
        for window in range(count)
    ]  # fmt: skip
    seconds = footage.times[-1]
    return items, fingerprint(read_frames(footage, (0.0, seconds / 2, seconds)))


def _size(height: int, width: int, data: DataConfig, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    size = choose_size(height, width, sizes)
    least = data.min_side or min(size) // 4
    if min(height, width) < least:
        raise ValueError(f"too small: {width}x{height}, the shorter side must have {least} pixels")
    return size


def _ratio_differs(one: torch.Size, other: torch.Size) -> bool:
    return abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1])) > 0.05


def _same_size(pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    from kandinsky5_core.canvas import resize

    size = tuple(pictures[0].shape[:2])
    return [resize(picture[None], size)[0] for picture in pictures]


def _tasks(data: DataConfig, variant: Variant, items: list[Item]) -> dict[str, float]:
    """Shares of the tasks that variant and material allow, adding up to 1.

    Raises:
        ValueError: the user names a task that they do not allow.
    """
    kinds = {item.example.kind for item in items}
    needs = {"t2v": "clip", "i2v": "clip", "t2i": "image", "i2i": "edit"}
    known = variant.tasks
    if variant.vae.temporal_ratio > 1:
        # A checkpoint for one of these can learn the others: they are one model class.
        known = ("t2v", "i2v", "t2i") if variant.dit.visual_cond else ("t2v", "t2i")
    possible = [task for task in known if needs[task] in kinds]
    if data.tasks:
        for task, share in data.tasks:
            if share and task not in possible:
                reason = "the material has none for it" if task in known else f"{variant.name} has no such task"
                raise ValueError(f"data.tasks asks for {task}: {reason}; possible are {', '.join(possible) or 'none'}")
        shares = {task: share for task, share in data.tasks if share}
    else:
        usual = [task for task in possible if task in (*variant.tasks, "t2i")] or possible
        table = TASK_SHARES[NANO_FAMILIES.get(variant.family, variant.family)]
        shares = {task: table.get(task, 1.0) for task in usual}
    total = sum(shares.values())
    return {task: share / total for task, share in shares.items()} if total else {}
