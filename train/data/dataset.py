"""Batches from cached material: a function of the batch's number alone, so that any run can go on anywhere.

Each bucket is a queue; shuffled epochs fill the queues one after another, and a queue that holds enough latent frames
gives a batch (report section 6.1.2). Pictures are in batches of their own.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.conditioning import ImageConditioning, TextConditioning, joined
from kandinsky5_core.config import Variant

from ..config import DataConfig
from ..objectives.flow_matching import Batch, hold_first
from .buckets import batch_size
from .cache import Cache, CachedItem
from .scan import KIND_OF_TASK

KEPT_BYTES = 512 << 20
"""Of samples that stay in memory after they were read."""

EncodeText = Callable[[str, CachedItem], TextConditioning]
"""(caption, sample) -> its embeddings, where they are not cached."""


@dataclass
class _Stream:
    """The endless sequence of batches of one kind, made as far as it is asked for."""

    items: Sequence[int]
    """Numbers of the samples, repeated as an epoch shows them."""
    bucket_of: Sequence[object]
    size_of: Sequence[int]
    """Samples in a batch, by sample."""
    seed: str

    def __post_init__(self) -> None:
        self._batches: list[list[int]] = []
        self._queues: dict[object, deque[int]] = {}
        self._epoch = 0

    def batch(self, number: int) -> list[int]:
        """Sample numbers of batch `number`."""
        while len(self._batches) <= number:
            self._next_epoch()
        return self._batches[number]

    def _next_epoch(self) -> None:
        order = list(self.items)
        random.Random(f"{self.seed}-{self._epoch}").shuffle(order)
        self._epoch += 1
        for index in order:
            queue = self._queues.setdefault(self.bucket_of[index], deque())
            queue.append(index)
            if len(queue) >= self.size_of[index]:
                self._batches.append([queue.popleft() for _ in range(self.size_of[index])])


@dataclass
class Batches:
    """`FlowMatching.batches` of cached material."""

    cache: Cache
    data: DataConfig
    variant: Variant
    encode_text: EncodeText | None = None
    """Needed where the cache holds no text."""
    items: list[CachedItem] = field(default_factory=list)
    """Those of the cache to use; empty for all."""

    def __post_init__(self) -> None:
        if not self.cache.has_text and self.encode_text is None:
            raise ValueError("the cache holds no text embeddings; give encode_text, or cache_text in the data")
        self.items = self.items or self.cache.items
        ratio = self.variant.vae.temporal_ratio
        buckets = [item.item.bucket for item in self.items]
        longest = max((item.item.bucket.latent_frames(ratio) for item in self.cache.items), default=1)
        sizes = [
            batch_size(item.item.bucket, item.item.example.kind, longest, self.data, ratio) for item in self.items
        ]
        kinds = sorted({KIND_OF_TASK[task] for task in self.cache.tasks})
        self._streams: dict[str, _Stream] = {}
        for kind in kinds:
            numbers = [
                index for index, item in enumerate(self.items) if item.item.example.kind == kind
                for _ in range(item.item.example.repeats)
            ]  # fmt: skip
            if numbers:
                self._streams[kind] = _Stream(numbers, buckets, sizes, f"{self.data.seed}-{kind}")
        if not self._streams:
            raise ValueError("no sample for any of the tasks")
        self._shares = {
            kind: sum(share for task, share in self.cache.tasks.items() if KIND_OF_TASK[task] == kind)
            for kind in self._streams
        }
        self._choices: list[tuple[str, int]] = []
        self._counts = dict.fromkeys(self._streams, 0)
        self._read: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._kept_bytes = 0

    def __call__(self, index: int, generator: torch.Generator) -> Batch:
        """Batch number `index`; dropout of captions and the choice of image to video come from the generator."""
        kind, number = self._choice(index)
        chosen = [self.items[position] for position in self._streams[kind].batch(number)]
        parts = [self._tensors(item.latents) for item in chosen]
        latents = torch.stack([part["latents"].float() for part in parts])
        dropped = torch.rand(len(chosen), generator=generator) < self.data.caption_dropout
        given = torch.rand(len(chosen), generator=generator) < self._share_given(kind)
        text = joined([self._text(item, bool(drop)) for item, drop in zip(chosen, dropped, strict=True)])
        image = None
        if kind == "clip" and bool(given.any()):
            # Inference encodes the given frame alone, so training holds what that gives.
            firsts = torch.stack([part["first"].float() for part in parts])
            image = hold_first(torch.cat([firsts, latents[:, :, 1:]], dim=2), given)
        if kind == "edit":
            source = torch.stack([part["source"].float() for part in parts])
            image = ImageConditioning(source=source, mask=torch.ones(len(chosen), 1, 1, 1, 1))
        return Batch(latents=latents, text=text, image=image)

    def holdout(self, share: float) -> tuple[Batches, Batches]:
        """(to train on, held out): of every kind the samples of that share of its files, chosen by the seed.

        Raises:
            ValueError: nothing would be held out.
        """
        out: set[Path] = set()
        for kind in self._streams:
            files = sorted({item.item.example.path for item in self.items if item.item.example.kind == kind})
            random.Random(f"{self.data.seed}-holdout").shuffle(files)
            # At least one, and never the last: without it the kind's tasks could not be trained.
            out.update(files[: min(max(1, round(share * len(files))), len(files) - 1)])
        if not out:
            raise ValueError(f"validation.holdout {share} needs at least two files of a kind; there is one")
        kept = [item for item in self.items if item.item.example.path not in out]
        held = [item for item in self.items if item.item.example.path in out]
        return replace(self, items=kept), replace(self, items=held)

    def describe(self) -> str:
        """For the log."""
        parts = []
        for kind, stream in self._streams.items():
            batches = sum(1 / stream.size_of[index] for index in stream.items)
            parts.append(f"{len(stream.items)} {kind} samples an epoch in about {math.ceil(batches)} batches")
        tasks = ", ".join(f"{task} {share:.2f}" for task, share in self.cache.tasks.items())
        return f"{'; '.join(parts)}; tasks {tasks}"

    def _choice(self, index: int) -> tuple[str, int]:
        """Kind of batch `index`, and which batch of that kind it is."""
        while len(self._choices) <= index:
            rng = random.Random(f"{self.data.seed}-kind-{len(self._choices)}")
            kind = rng.choices(list(self._shares), list(self._shares.values()))[0]
            self._choices.append((kind, self._counts[kind]))
            self._counts[kind] += 1
        return self._choices[index]

    def _share_given(self, kind: str) -> float:
        """Share of image to video among the clips."""
        if kind != "clip":
            return 0.0
        tasks = self.cache.tasks
        return tasks.get("i2v", 0.0) / self._shares["clip"]

    def _text(self, item: CachedItem, dropped: bool) -> TextConditioning:
        if not self.cache.has_text:
            return self.encode_text("" if dropped else item.item.caption, item)
        return self.cache.text(item.empty if dropped else item.text)

    def _tensors(self, key: str) -> dict[str, Tensor]:
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        sample = self._read[key] = self.cache.tensors(key)
        self._kept_bytes += _bytes(sample)
        while self._kept_bytes > KEPT_BYTES and len(self._read) > 1:
            self._kept_bytes -= _bytes(self._read.popitem(last=False)[1])
        return sample


def _bytes(sample: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in sample.values())
