"""Checkpoints of a run: tensors in safetensors, the rest in JSON, written aside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optim import MovingAverage, Optimizers

TENSORS, PROGRESS = "state.safetensors", "state.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` by `value` at once: a reader sees the old file or the new, never half of one."""
    aside = path.with_suffix(path.suffix + ".partial")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    aside.replace(path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace the safetensors file `path` at once."""
    aside = path.with_suffix(path.suffix + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata=metadata)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizers: Optimizers, average: MovingAverage) -> None:
    """Everything that the next step depends on. The step stands inside the tensor file, so one rename commits all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizers.state_tensors().items()}
    write_tensors(folder / TENSORS, tensors, {"step": str(step), "num_updates": str(average.num_updates)})
    write_json(folder / PROGRESS, {"step": step, "pid": os.getpid()})


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, average: MovingAverage) -> int:
    """Restore in place; the number of finished steps, 0 where the folder holds no checkpoint."""
    path = folder / TENSORS
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict(_part(tensors, "model."))
    average.weights = _part(tensors, "average.")
    optimizers.load_state_tensors(_part(tensors, "optimizer."))
    metadata = _metadata(path)
    average.num_updates = int(metadata["num_updates"])
    return int(metadata["step"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header["__metadata__"]
