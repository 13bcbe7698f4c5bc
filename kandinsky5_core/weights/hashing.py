"""A short name for the exact weights in use."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .container import read_header
from .source import open_source

_PIECE = 4 << 20
_SAMPLES, _SAMPLE = 64, 4096


def model_hash(path: str | Path, *, length: int = 16, want: str | None = None) -> str:
    """First `length` hex digits of the sha256 over the tensors' bytes, shards in the order of their names.

    Headers are left out, so metadata and renaming (a prefix, say) do not change it. Reads a few megabytes at a time.
    """
    digest = hashlib.sha256()
    for file in sorted(open_source(path, want=want).files):
        records, _ = read_header(file)
        with file.open("rb") as stream:
            stream.seek(min((record.begin for record in records.values()), default=0))
            while piece := stream.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:length]


def sampled_hash(path: str | Path, *, length: int = 16, want: str | None = "dit") -> str:
    """The same over 64 pieces of 4 KiB, evenly spread over each file: tells weights apart without reading them all."""
    digest = hashlib.sha256()
    for file in sorted(open_source(path, want=want).files):
        records, _ = read_header(file)
        begin = min((record.begin for record in records.values()), default=0)
        size = file.stat().st_size
        digest.update(str(size - begin).encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(begin + (size - begin) * number // _SAMPLES)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:length]
