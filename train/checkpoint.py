"""Checkpoints of a run: one safetensors file a step, written aside, flushed to the disk and renamed.

A file that has its name is whole. The newest ones and the best one stay; a damaged one is passed over for the one
before it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .jobs import CHECKPOINTS, write_json
from .optim import MovingAverage, Optimizers

log = logging.getLogger(__name__)

BEST = "best.json"
_NAME = "step-{:08d}.safetensors"


@dataclass
class Progress:
    """What a run remembers beside tensors."""

    step: int = 0
    """Finished optimizer steps."""
    smoothed: float | None = None
    """Moving average of the loss."""
    lowest: float | None = None
    """Lowest value of `smoothed`."""
    best: float | None = None
    """Lowest validation loss."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace the safetensors file `path` at once.

    Raises:
        OSError: no room or no right to write; names the file, its size and what there is. The old file stays.
    """
    aside = path.with_suffix(path.suffix + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata=metadata)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (SafetensorError, OSError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} could not be written ({needed / 1e9:.2f} GB; {free / 1e9:.2f} GB free on its disk): {error}"
        ) from error
    finally:
        # A full disk may refuse this too; the name says what it is.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, optimizers: Optimizers, average: MovingAverage
) -> Path:
    """Everything that the next step depends on, as one file below `folder`/checkpoints."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.saved().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizers.state_tensors().items()}
    metadata = {"progress": json.dumps(vars(progress)), "num_updates": str(average.num_updates)}
    path = folder / CHECKPOINTS / _NAME.format(progress.step)
    write_tensors(path, tensors, metadata)
    return path


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, average: MovingAverage) -> Progress:
    """Restore in place from the newest whole checkpoint; a fresh `Progress` where there is none."""
    for leftover in (folder / CHECKPOINTS).glob("*.partial"):
        leftover.unlink()
    for path in reversed(list_checkpoints(folder)):
        try:
            tensors, metadata = load_file(path), _metadata(path)
            progress = Progress(**json.loads(metadata["progress"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); going on from the one before it", path, error)
            continue
        model.load_state_dict(_part(tensors, "model."))
        average.restore(_part(tensors, "average."), int(metadata["num_updates"]))
        optimizers.load_state_tensors(_part(tensors, "optimizer."))
        return progress
    return Progress()


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished ones, oldest first."""
    return sorted((folder / CHECKPOINTS).glob("step-*.safetensors"))


def mark_best(folder: Path, progress: Progress) -> None:
    """Remember the checkpoint of this step as the one with the lowest validation loss."""
    write_json(folder / CHECKPOINTS / BEST, {"step": progress.step, "validation": progress.best})


def best_step(folder: Path) -> int | None:
    """Step of the best checkpoint."""
    try:
        return int(json.loads((folder / CHECKPOINTS / BEST).read_text(encoding="utf-8"))["step"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one."""
    best = best_step(folder)
    for path in list_checkpoints(folder)[:-keep_last]:
        if best is None or path.name != _NAME.format(best):
            path.unlink(missing_ok=True)


def average_of(path: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint, else its weights."""
    tensors = load_file(path)
    return _part(tensors, "average.") or _part(tensors, "model.")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header["__metadata__"]
