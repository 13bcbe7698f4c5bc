"""A safetensors file written tensor by tensor: header first, so only one tensor is in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .container import DTYPES, TensorRecord

CODES = {dtype: code for code, (_, dtype) in DTYPES.items()}
_SPARE_BYTES = 1 << 20


def planned(records: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Records in the order in which they are written: as they lie in their files."""
    return dict(sorted(records.items(), key=lambda item: (str(item[1].file), item[1].begin, item[0])))


class StreamWriter:
    """Writes tensors in the planned order beside `target`, and renames at the end; a context manager.

    Whatever ends it early, an exception or a full disk, leaves nothing behind and `target` as it was.
    """

    def __init__(self, target: Path, plan: Mapping[str, TensorRecord], metadata: Mapping[str, str]) -> None:
        """
        Args:
            plan: Name to shape and dtype, in the order of writing.

        Raises:
            ValueError: the folder is missing, or the disk has too little room.
        """
        self.target, self.plan = Path(target), dict(plan)
        self.aside = self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.tmp")
        self.left = list(self.plan)
        size = sum(record.nbytes for record in self.plan.values())
        if not self.target.parent.is_dir():
            raise ValueError(f"the folder of {self.target} does not exist; make it first")
        free = shutil.disk_usage(self.target.parent).free
        if free < size + _SPARE_BYTES:
            raise ValueError(
                f"{self.target} takes {size / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; make room"
            )
        self.header = _header(self.plan, metadata)

    def __enter__(self) -> StreamWriter:
        self.file = self.aside.open("xb")
        self.file.write(self.header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the plan, in its planned dtype."""
        assert self.left and self.left[0] == name, f"{name} is not the next tensor of the plan"
        record = self.plan[self.left.pop(0)]
        assert tuple(tensor.shape) == tuple(record.shape)
        data = tensor.detach().to("cpu", DTYPES[record.dtype][1]).contiguous()
        if data.numel():
            self.file.write(data.reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self.left, f"{len(self.left)} planned tensors were not written"
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                self.aside.replace(self.target)
        finally:
            self.file.close()
            self.aside.unlink(missing_ok=True)


def _header(plan: Mapping[str, TensorRecord], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in metadata.items()}}
    position = 0
    for name, record in plan.items():
        header[name] = {
            "dtype": record.dtype, "shape": list(record.shape), "data_offsets": [position, position + record.nbytes],
        }  # fmt: skip
        position += record.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
