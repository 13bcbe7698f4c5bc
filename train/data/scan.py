"""What training material comes to, before any model is loaded: what is usable and what is not, and what it costs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kandinsky5_core.config import Variant
from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.media import read_image
from kandinsky5_core.shapes import VideoShape

from ..config import DataConfig
from .buckets import LENGTHS, Bucket, batch_size, bucket_sizes, choose_length, choose_size, longest_clip
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
KIND_OF_TASK = {"t2v": "clip", "i2v": "clip", "t2i": "image", "i2i": "edit"}
"""What a task is trained on."""
NAMED = 20
"""Files of each sort that a report for people names."""
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
    batches: dict[str, float]
    """Batches that show every sample of a kind once."""
    cost: Cost

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
        """For people: a table of the buckets between what was found and what was left out."""
        kinds = Counter(item.example.kind for item in self.items)
        domains = Counter(item.example.domain for item in self.items if item.example.domain)
        lines = [
            f"found {self.num_found}: {_counted(kinds) or 'nothing usable'}; {len(self.problems)} left out, "
            f"{len(self.duplicates)} duplicates, {self.num_without_caption} without a caption (trained on with an "
            "empty one, or the trigger alone)"
        ]
        lines += [f"  {bucket!s:>16}  {_counted(count)}" for bucket, count in sorted(self.buckets().items())]
        if domains:
            named = ", ".join(f"{name} {count}" for name, count in sorted(domains.items()))
            lines.append(f"domains: {named}")
        if self.tasks:
            shares = ", ".join(f"{task} {share:.0%}" for task, share in self.tasks.items())
            batches = ", ".join(f"{math.ceil(count)} of {kind}s" for kind, count in self.batches.items())
            lines.append(f"tasks: {shares}; every sample once: batches {batches}")
        lines.append(self.cost.text())
        lines += _shortened([f"left out: {problem.path}: {problem.reason}" for problem in self.problems])
        lines += _shortened([f"duplicate: {one} is like {other}" for one, other in self.duplicates])
        return "\n".join(lines)

    def buckets(self) -> dict[Bucket, Counter]:
        """Samples of each kind in each bucket."""
        found: dict[Bucket, Counter] = {}
        for item in self.items:
            found.setdefault(item.bucket, Counter())[item.example.kind] += 1
        return found

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "found": self.num_found, "samples": len(self.items), "without_caption": self.num_without_caption,
            "problems": [{"path": str(problem.path), "reason": problem.reason} for problem in self.problems],
            "duplicates": [[str(one), str(other)] for one, other in self.duplicates],
            "buckets": {str(bucket): count.total() for bucket, count in sorted(self.buckets().items())},
            "kinds": dict(Counter(item.example.kind for item in self.items)),
            "domains": dict(Counter(item.example.domain for item in self.items)),
            "tasks": self.tasks, "batches": self.batches, "cost": self.cost.as_dict(),
        }  # fmt: skip


def _counted(counts: Counter) -> str:
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in sorted(counts.items()))


def _shortened(lines: list[str]) -> list[str]:
    return [*lines[:NAMED], *([f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else [])]


def scan(data: DataConfig, variant: Variant, *, on_item: OnItem | None = None) -> ScanReport:
    """Look at every file that the sources name.

    Args:
        on_item: Called before each file; may raise to cancel.

    Raises:
        ValueError: a source is missing or is no folder and no table.
    """
    examples, problems = read_sources(data)
    num_found = len(examples) + len(problems)
    sizes = bucket_sizes(data, variant)
    longest = longest_clip(data, variant)
    usable: list[Example] = []
    looks: dict[_Files, _Look] = {}
    for number, example in enumerate(examples, 1):
        if on_item is not None:
            on_item(f"looking at {example.path.name}, {number} of {len(examples)}")
        try:
            if _files(example) not in looks:
                looks[_files(example)] = _look(example, data, variant, sizes, longest)
            usable.append(example)
        except ValueError as error:
            problems.append(Problem(path=example.path, reason=str(error)))
    kept, duplicates = _without_duplicates(usable, looks)
    items = [
        Item(
            example=example, caption=clean_caption(example.caption, data.trigger), bucket=looks[_files(example)].bucket,
            moments=moments,
        )
        for example in (kept if data.drop_duplicates else usable)
        for moments in looks[_files(example)].windows
    ]  # fmt: skip
    tasks = _tasks(data, variant, items)
    items, unused = _used(items, tasks)
    return ScanReport(
        variant=variant, items=items, problems=problems + unused, duplicates=duplicates, num_found=num_found,
        num_without_caption=sum(not example.caption.strip() for example in usable),
        tasks=tasks, batches=_batches(items, data, variant), cost=estimate(items, data, variant),
    )  # fmt: skip


_Files = tuple[Path, Path | None]


def _files(example: Example) -> _Files:
    return example.path, example.source


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one file, or a pair of them, gives."""

    bucket: Bucket
    windows: list[tuple[float, ...]]
    """`Item.moments` of each sample."""
    fingerprint: Fingerprint


def _without_duplicates(
    examples: list[Example], looks: dict[_Files, _Look]
) -> tuple[list[Example], list[tuple[Path, Path]]]:
    """(those that stay, (left out, same as)). A file that is named again with another caption stays."""
    files = list(looks)
    same = near_duplicates([look.fingerprint for look in looks.values()])
    like = {files[later][0]: files[earlier][0] for later, earlier in same.items()}
    dropped = {files[later] for later in same}
    kept, seen, duplicates = [], set(), list(like.items())
    for example in examples:
        if _files(example) in dropped:
            continue
        if (*_files(example), example.caption) in seen:
            duplicates.append((example.path, example.path))
            continue
        seen.add((*_files(example), example.caption))
        kept.append(example)
    return kept, duplicates


def _used(items: list[Item], tasks: dict[str, float]) -> tuple[list[Item], list[Problem]]:
    """The samples that a task trains on; the others are told, and not encoded for nothing."""
    if not tasks:
        return items, []
    kinds = {KIND_OF_TASK[task] for task in tasks}
    rest = {item.example.path: item.example.kind for item in items if item.example.kind not in kinds}
    names = {"clip": "a clip", "image": "a picture", "edit": "an edit"}
    reasons = {kind: f"{name}, and the tasks ({', '.join(tasks)}) use none" for kind, name in names.items()}
    unused = [Problem(path=path, reason=reasons[kind]) for path, kind in rest.items()]
    return [item for item in items if item.example.kind in kinds], unused


def _batches(items: list[Item], data: DataConfig, variant: Variant) -> dict[str, float]:
    """Batches that show every sample of a kind once, with its repeats."""
    ratio = variant.vae.temporal_ratio
    longest = max((item.bucket.latent_frames(ratio) for item in items), default=1)
    counts: dict[str, float] = {}
    for item in items:
        kind = item.example.kind
        share = item.example.repeats / batch_size(item.bucket, kind, longest, data, ratio)
        counts[kind] = counts.get(kind, 0.0) + share
    return {kind: round(count, 2) for kind, count in counts.items()}


def _look(
    example: Example, data: DataConfig, variant: Variant, sizes: tuple[tuple[int, int], ...], longest: int
) -> _Look:
    """What one file gives.

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
    look = fingerprint(torch.cat([part[None] for part in _same_size(pictures)]))
    return _Look(bucket=Bucket(*size, 1), windows=[()], fingerprint=look)


def _look_at_clip(
    example: Example, data: DataConfig, variant: Variant, sizes: tuple[tuple[int, int], ...], longest: int
) -> _Look:
    if variant.vae.temporal_ratio == 1:
        raise ValueError(f"a clip, and {variant.name} makes pictures")
    footage = look_at(example.path)
    size = _size(footage.height, footage.width, data, sizes)
    available = footage.num_frames(variant.fps)
    length = choose_length(available, longest)
    if not length:
        raise ValueError(f"too short: {available} frames at {variant.fps} a second, at least {LENGTHS[0]} are needed")
    VideoShape(1, length, *size).check(variant.vae)
    # All of a long clip, as windows one after another around its middle.
    count = available // length
    first = (available - count * length) // 2
    windows = [
        tuple((first + window * length + frame) / variant.fps for frame in range(length)) for window in range(count)
    ]
    last = footage.times[-1]
    look = fingerprint(torch.cat([read_frames(footage, (moment,)) for moment in (0.0, last / 2, last)]))
    return _Look(bucket=Bucket(*size, length), windows=windows, fingerprint=look)


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
    known = variant.tasks
    if variant.vae.temporal_ratio > 1:
        # A checkpoint for one of these can learn the others: they are one model class.
        known = ("t2v", "i2v", "t2i") if variant.dit.visual_cond else ("t2v", "t2i")
    possible = [task for task in known if KIND_OF_TASK[task] in kinds]
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
