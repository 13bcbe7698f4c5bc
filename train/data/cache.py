"""Material encoded once: latents, and text if wished, in shards keyed by content.

A sample's key comes from the bytes of its file, its cut and the VAE's weights; that of a text from its words, its
template and the text encoders' weights. So a changed caption, file or model makes anew what it concerns and nothing
else, one cache serves many jobs, and an interrupted run goes on at the last whole shard.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5_core.canvas import cover
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import Variant
from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.inputs import encode_frames
from kandinsky5_core.media import read_image
from kandinsky5_core.pipeline import Models
from kandinsky5_core.text.encoder import TextEncoder
from kandinsky5_core.vae.tiling import DEFAULT_BUDGET_BYTES

from ..config import DataConfig
from .cost import latent_bytes, text_bytes
from .scan import Item, OnItem, ScanReport
from .shards import SAMPLES, TEXTS, Place, ShardWriter, index_shards, locked, read_sample, resolution_class

log = logging.getLogger(__name__)

KEY_LENGTH = 32
LATENT_DTYPE = torch.float16
"""Rounds latents by at most 2^-11 of each value, less than bf16 networks do."""
_PIECE = 4 << 20


@dataclass(frozen=True, kw_only=True)
class CachedItem:
    """A sample and where its parts are."""

    item: Item
    latents: str
    """Key of its latents; for an edit, of those after and before it."""
    text: str
    """Key of its caption's embeddings."""
    empty: str
    """Key of the empty caption's, with the same template and pictures."""


@dataclass
class Cache:
    """What `build_cache` made or found."""

    items: list[CachedItem]
    tasks: dict[str, float]
    places: dict[str, Place]
    has_text: bool

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Of a sample or a text."""
        return read_sample(self.places[key])

    def text(self, key: str) -> TextConditioning:
        """Embeddings of one caption, (1, L, D), without padding."""
        part = self.tensors(key)
        embeds = part["embeds"][None]
        return TextConditioning(
            embeds=embeds, pooled=part["pooled"][None], mask=torch.ones(embeds.shape[:2], dtype=torch.bool)
        )


@dataclass(kw_only=True)
class Hashes:
    """Names of the weights that a cache depends on."""

    vae: str
    text: str


def build_cache(
    report: ScanReport, data: DataConfig, models: Models, hashes: Hashes, folder: Path, *,
    on_item: OnItem | None = None, budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Cache:  # fmt: skip
    """Encode what is not there yet.

    Args:
        models: Text encoders and VAE; the DiT is not used.
        on_item: Called before each sample; may raise to cancel, what was made is kept then.

    Raises:
        OSError: no room for a shard; the ones before stay.
        ValueError: a file changed into something unreadable since the scan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hashes = Hashes(
        vae=f"{hashes.vae} {_dtype(models.vae)}",
        text=f"{hashes.text} {_dtype(models.text_encoder.qwen)}" if data.cache_text else "",
    )
    content = _content_hashes(report.items, on_item)
    items = [_keyed(item, content, hashes) for item in report.items]
    with locked(folder, on_item):
        places = index_shards(folder)
        missing = list({item.latents: item for item in items if item.latents not in places}.values())
        log.info("cache %s: %d of %d samples are there", folder, len(items) - len(missing), len(items))
        _check_room(folder, missing, items, places, data, models.variant)
        if missing:
            with models.on_device(models.vae):
                _encode_missing(missing, models, folder, on_item, budget_bytes)
        if data.cache_text:
            texts = {key: value for key, value in _texts(items).items() if key not in places}
            if texts:
                with models.on_device(models.text_encoder):
                    _encode_texts(texts, models, folder, on_item)
        places = index_shards(folder, places)
    return Cache(items=items, tasks=report.tasks, places=places, has_text=data.cache_text)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _check_room(
    folder: Path, missing: Sequence[CachedItem], items: Sequence[CachedItem], places: Mapping[str, Place],
    data: DataConfig, variant: Variant,
) -> None:  # fmt: skip
    """Refuse to begin what will not fit on the disk.

    Raises:
        ValueError: too little room.
    """
    needed = latent_bytes([cached.item for cached in missing], variant)
    if data.cache_text:
        texts = {cached.text: cached.item for cached in items if cached.text not in places}
        needed += text_bytes(texts.values(), variant)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the cache needs about {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free; make "
            "room, name another folder as data.cache, or choose a smaller area or fewer frames"
        )


def _content_hashes(items: Sequence[Item], on_item: OnItem | None) -> dict[Path, str]:
    paths = sorted(_paths(items))
    found = {}
    for number, path in enumerate(paths, 1):
        if on_item is not None:
            on_item(f"reading {path.name}, {number} of {len(paths)}")
        found[path] = _content_hash(path)
    return found


def _paths(items: Iterable[Item]) -> set[Path]:
    return {path for item in items for path in (item.example.path, item.example.source) if path is not None}


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise ValueError(f"{path} cannot be read any more: {error.strerror}") from error
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:KEY_LENGTH]


def _keyed(item: Item, content: dict[Path, str], hashes: Hashes) -> CachedItem:
    example = item.example
    own = content[example.path]
    before = content[example.source] if example.source is not None else ""
    window = [round(moment, 4) for moment in item.moments]
    task = text_task(example.kind)
    shown = (before, item.bucket) if before else ()
    # The bucket says how a picture is cut, and with it what the text encoder is shown of it.
    return CachedItem(
        item=item,
        latents=_key("latents", own, before, item.bucket, window, hashes.vae, LATENT_DTYPE),
        text=_key("text", item.caption, task, shown, hashes.text),
        empty=_key("text", "", task, shown, hashes.text),
    )


def text_task(kind: str) -> str:
    """The task whose text template a kind of material takes; image to video shares that of text to video."""
    return {"clip": "t2v", "image": "t2i", "edit": "i2i"}[kind]


@dataclass
class _Writers:
    """A `ShardWriter` for each kind and size, flushed whatever happens."""

    folder: Path
    writers: dict[str, ShardWriter] = field(default_factory=dict)

    def get(self, prefix: str, size: int) -> ShardWriter:
        return self.writers.setdefault(prefix, ShardWriter(self.folder, prefix, size))

    @contextmanager
    def kept(self) -> Iterator[_Writers]:
        """Write what is finished on the way out, also when cancelled."""
        try:
            yield self
        finally:
            for writer in self.writers.values():
                writer.flush()


def _encode_missing(
    missing: Sequence[CachedItem], models: Models, folder: Path, on_item: OnItem | None, budget_bytes: int
) -> None:
    began = time.monotonic()
    with _Writers(folder).kept() as writers, torch.no_grad():
        for number, cached in enumerate(missing):
            item = cached.item
            if on_item is not None:
                left = (time.monotonic() - began) / number * (len(missing) - number) if number else 0
                rest = f", {left:.0f} s left" if number else ""
                on_item(f"encoding {item.example.path.name}, {number + 1} of {len(missing)}{rest}")
            latents = _encode(item, models, budget_bytes)
            stored = {name: tensor.to(LATENT_DTYPE).cpu() for name, tensor in latents.items()}
            kind = "clip" if item.example.kind == "clip" else "image"
            size = resolution_class(item.bucket.height * item.bucket.width)
            writer = writers.get(f"{item.example.kind}-{size}", SAMPLES[kind, size])
            example = item.example
            told = {"caption": item.caption, "bucket": list(item.bucket), "file": example.path.name}
            writer.add(cached.latents, stored, {**told, "domain": example.domain})


def _encode(item: Item, models: Models, budget_bytes: int) -> dict[str, Tensor]:
    """All latents of a sample, (C, T, h, w): `latents`, of an edit also `source`, of a clip also `first`.

    `first` is the first frame encoded alone, as image to video is given it: the VAE's convolutions are causal, but
    its group norms see the whole clip, so that within the clip the same frame has slightly other latents.
    """
    frames = frames_of(item)
    latents = {"latents": encode_frames(models, frames, budget_bytes)[0]}
    if item.example.kind == "clip":
        latents["first"] = encode_frames(models, frames[:1], budget_bytes)[0]
    if item.example.source is not None:
        latents["source"] = encode_frames(models, source_of(item), budget_bytes)[0]
    return latents


def frames_of(item: Item) -> Tensor:
    """(F, H, W, 3) in [0, 1] of the bucket's shape: covered and cut around the middle."""
    if item.example.kind == "clip":
        frames = read_frames(look_at(item.example.path), item.moments)
    else:
        frames = read_image(item.example.path)[None]
    return _cut(frames, item)


def source_of(item: Item) -> Tensor:
    """The picture before an edit, cut as the one after it."""
    assert item.example.source is not None
    return _cut(read_image(item.example.source)[None], item)


def _cut(frames: Tensor, item: Item) -> Tensor:
    canvas = cover(tuple(frames.shape[1:3]), (item.bucket.height, item.bucket.width))
    return canvas.to_work(frames).clamp(0, 1)


def _texts(items: Sequence[CachedItem]) -> dict[str, tuple[str, CachedItem]]:
    """(caption, a sample it belongs to) of every text by its key, the empty ones too."""
    captions = {cached.text: (cached.item.caption, cached) for cached in items}
    return captions | {cached.empty: ("", cached) for cached in items}


def _encode_texts(
    texts: Mapping[str, tuple[str, CachedItem]], models: Models, folder: Path, on_item: OnItem | None
) -> None:
    with _Writers(folder).kept() as writers:
        for number, (key, (caption, cached)) in enumerate(texts.items(), 1):
            if on_item is not None:
                on_item(f"encoding caption {number} of {len(texts)}")
            text = encode_caption(models.text_encoder, caption, cached.item, models.variant.max_text_tokens)
            tensors = {"embeds": text.embeds[0].cpu(), "pooled": text.pooled[0].cpu()}
            writers.get("text", TEXTS).add(key, tensors, {"caption": caption})


def encode_caption(encoder: TextEncoder, caption: str, item: Item, max_tokens: int) -> TextConditioning:
    """Embeddings of a caption as inference makes them; those of an edit have seen the picture before it."""
    task = text_task(item.example.kind)
    images = [source_of(item)[0]] if item.example.source is not None else None
    return encoder.encode([caption], task=task, max_tokens=max_tokens, images=images).trimmed()
