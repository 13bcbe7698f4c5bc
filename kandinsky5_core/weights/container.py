"""Reading safetensors files: the header, its checks, and tensors mapped from the file.

Layout of a file: 8 bytes of little-endian header length, a JSON header (name -> dtype, shape, data_offsets; and
`__metadata__`), then the tensors' bytes. Only the header is read here until a tensor is asked for.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_HEADER_BYTES = 100_000_000
MAP_SPAN = 1 << 30
"""Bytes mapped at a time for weights used in place: a private map of a whole 77 GB file is refused by kernels with
less memory than that, one map a tensor runs out of file descriptors."""
CAST_SPAN = 8 << 20
"""Bytes mapped at a time for weights that are cast or moved: source pages count as memory while they are mapped."""

DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "F64": ("fp64", torch.float64),
    "F32": ("fp32", torch.float32),
    "F16": ("fp16", torch.float16),
    "BF16": ("bf16", torch.bfloat16),
    "F8_E4M3": ("fp8_e4m3", torch.float8_e4m3fn),
    "F8_E5M2": ("fp8_e5m2", torch.float8_e5m2),
    "I64": ("int64", torch.int64),
    "I32": ("int32", torch.int32),
    "I16": ("int16", torch.int16),
    "I8": ("int8", torch.int8),
    "U8": ("uint8", torch.uint8),
    "BOOL": ("bool", torch.bool),
}
"""Safetensors dtype code -> our word for it and the torch dtype."""
LOADABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that weights are loaded and converted from."""

_MAGIC = (
    (b"PK\x03\x04", "a pickled PyTorch checkpoint (zip)"),
    (b"\x80\x02", "a pickled PyTorch checkpoint"),
    (b"\x80\x03", "a pickled PyTorch checkpoint"),
    (b"\x80\x04", "a pickled PyTorch checkpoint"),
    (b"\x80\x05", "a pickled PyTorch checkpoint"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page (a failed download?)"),
    (b"\x89HDF", "an HDF5 file"),
)


class WeightsError(ValueError):
    """A weights file or folder that cannot be used: says what it looks like and what was expected."""


class TensorRecord(NamedTuple):
    """Where one tensor lies: `begin` is the absolute byte offset in `file`."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors code: 'BF16', 'F32', ..."""
    file: Path | None = None
    """None where only shapes are known."""
    begin: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][1].itemsize


def read_header(path: Path) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    """(tensors, metadata) of one safetensors file, from its header alone.

    Raises:
        WeightsError: the file is not safetensors (named by its first bytes), truncated or malformed.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected a .safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise WeightsError(f"{path}: looks like {_looks_like(start)}; expected a safetensors file")
        if 8 + length > size:
            raise WeightsError(
                f"{path}: truncated: its header wants {8 + length} bytes, the file has {size}; get it again"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _record(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its safetensors header is malformed ({error}); get the file again") from error
    _check_data(path, tensors, 8 + length, size)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _looks_like(start: bytes) -> str:
    if not start:
        return "an empty file"
    for magic, words in _MAGIC:
        if start.startswith(magic):
            extra = ", which can run code when opened and is never read here" if "pickled" in words else ""
            return words + extra
    return f"no known format (first bytes {start[:8].hex()})"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name is given twice")
    return keys


def _record(path: Path, data_start: int, entry: dict[str, Any]) -> TensorRecord:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is unknown; known are {', '.join(DTYPES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} or offsets {begin}, {end} are not sizes")
    record = TensorRecord(shape, entry["dtype"], path, data_start + begin)
    if record.nbytes != end - begin:
        raise ValueError(f"a tensor of shape {shape} and dtype {entry['dtype']} has {end - begin} bytes")
    return record


def _check_data(path: Path, tensors: dict[str, TensorRecord], data_start: int, size: int) -> None:
    position = data_start
    for name, record in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if record.begin != position:
            raise WeightsError(f"{path}: tensor '{name}' overlaps another or leaves a gap; get the file again")
        position += record.nbytes
    if position > size:
        raise WeightsError(f"{path}: truncated: its tensors want {position} bytes, the file has {size}; get it again")
    if position < size:
        raise WeightsError(f"{path}: {size - position} bytes follow its last tensor; get the file again")


class MappedFile:
    """One safetensors file, mapped span by span, copy-on-write: changing a tensor never changes the file."""

    def __init__(self, path: Path, span: int) -> None:
        self.path, self.span = path, span
        self.size = path.stat().st_size
        self.map: mmap.mmap | None = None
        self.start = self.stop = 0

    def flat(self, record: TensorRecord, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Elements `first` to `last` of a tensor, 1-D, in place in the mapped file. Keeps its map alive."""
        dtype = DTYPES[record.dtype][1]
        count = (record.numel if last is None else last) - first
        if count == 0:
            return torch.empty(0, dtype=dtype)
        begin = record.begin + first * dtype.itemsize
        self._map(begin, begin + count * dtype.itemsize)
        offset = begin - self.start
        if begin % dtype.itemsize:
            raw = torch.frombuffer(self.map, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
            return raw.clone().view(dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)

    def pieces(self, record: TensorRecord) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of its first element, 1-D tensor) for each piece of at most `span` bytes."""
        step = max(1, self.span // DTYPES[record.dtype][1].itemsize)
        for first in range(0, record.numel, step):
            yield first, self.flat(record, first, min(first + step, record.numel))

    def _map(self, begin: int, end: int) -> None:
        if self.map is not None and self.start <= begin and end <= self.stop:
            return
        self.start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self.stop = max(end, min(self.start + self.span, self.size))
        with self.path.open("rb") as file:
            self.map = mmap.mmap(
                file.fileno(), self.stop - self.start, access=mmap.ACCESS_COPY, offset=self.start
            )  # fmt: skip
