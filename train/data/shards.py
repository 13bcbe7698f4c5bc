"""Tar shards that the webdataset library reads: `<key>.safetensors` and `<key>.json` for each sample.

A shard appears when it is whole; what lies under its name is complete. Headers hold no times or owners, so equal
samples give equal files.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ..config import LOW_AREA, MEDIUM_AREA
from ..jobs import try_lock, unlock

TENSORS, METADATA = ".safetensors", ".json"
SAMPLES = {
    ("image", "low"): 1024, ("image", "medium"): 256, ("image", "high"): 64,
    ("clip", "low"): 16, ("clip", "medium"): 4, ("clip", "high"): 1,
}  # fmt: skip
"""In one shard (report section 6.1.1)."""
TEXTS = 64
"""Captions in one shard, which wait in memory; the report encodes them while training."""
LOCK = "lock"
WAIT_SECONDS = 0.5


def resolution_class(area: int) -> str:
    """'low', 'medium' or 'high' of the pixels of a frame."""
    return "low" if area <= LOW_AREA else "medium" if area <= MEDIUM_AREA else "high"


@contextmanager
def locked(folder: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Be the only one who writes to a cache.

    Args:
        on_wait: Called while another process writes; may raise to give up.
    """
    with (folder / LOCK).open("a+b") as file:
        while not try_lock(file):
            if on_wait is not None:
                on_wait(f"waiting for another job that fills {folder}")
            time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            unlock(file)


@dataclass
class ShardWriter:
    """Samples of one kind into numbered shards of a folder."""

    folder: Path
    prefix: str
    size: int
    """Samples in a shard."""

    def __post_init__(self) -> None:
        self._waiting: list[tuple[str, bytes, bytes]] = []
        self._keys: set[str] = set()

    def add(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """One sample; written with the others of its shard."""
        assert "." not in key, "webdataset splits names at the first dot"
        if key in self._keys:
            return
        self._keys.add(key)
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._waiting.append((key, data, json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()))
        if len(self._waiting) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Write what waits, as a shard that may be short of samples.

        Raises:
            OSError: no room; nothing half-written stays.
        """
        if not self._waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._next_path()
        aside = path.with_suffix(".partial")
        try:
            with aside.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                    for key, data, metadata in self._waiting:
                        _add(tar, key + TENSORS, data)
                        _add(tar, key + METADATA, metadata)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            needed, free = sum(len(data) for _, data, _ in self._waiting), shutil.disk_usage(self.folder).free
            self._waiting.clear()
            raise OSError(
                f"{path} could not be written ({needed / 1e6:.0f} MB; {free / 1e6:.0f} MB free on its disk): {error}"
            ) from error
        self._waiting.clear()

    def _next_path(self) -> Path:
        taken = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{self.prefix}-??????.tar")]
        return self.folder / f"{self.prefix}-{max(taken, default=-1) + 1:06d}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class Place:
    """Where a sample's tensors lie."""

    path: Path
    offset: int
    size: int


def index_shards(folder: Path, known: Mapping[str, Place] | None = None) -> dict[str, Place]:
    """Every sample of a folder's shards by key; leftovers of a crash are removed, damaged shards named.

    Args:
        known: What an earlier look found: its shards are not opened again.

    Raises:
        ValueError: a shard is damaged.
    """
    found = dict(known or {})
    opened = {place.path for place in found.values()}
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    for path in sorted(set(folder.glob("*.tar")) - opened):
        try:
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(TENSORS):
                        found[member.name.removesuffix(TENSORS)] = Place(path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"shard {path} is damaged ({error}); delete it, and its samples are made again") from error
    return found


def read_sample(place: Place) -> dict[str, Tensor]:
    """The tensors of a sample."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        return load(file.read(place.size))
