"""What a job tells while it runs: status.json, progress.jsonl, TensorBoard, and the log."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from kandinsky5_core.memory.peak import peak_memory_bytes

from .checkpoint import Progress
from .jobs import TENSORBOARD, Job, Status
from .loop import Stopped, Watcher

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .validation import Validation

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.5
"""Between two writings of status.json within a phase."""
LOG_SECONDS = 15.0
"""Between two lines about steps in a log that is no terminal."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")


@dataclass
class StopSignals:
    """Ctrl-C and the like as a wish: the first ends the run after its step, saved; a second one ends it at once."""

    received: str = ""

    @contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Heed signals in the body."""
        before = {number: signal.signal(number, self._heed) for number in _numbers()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@dataclass
class JobWatcher(Watcher):
    """A `Watcher` that keeps a job's folder up to date."""

    job: Job = field(kw_only=True)
    signals: StopSignals = field(default_factory=StopSignals, kw_only=True)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"), kw_only=True)
    validation: Validation | None = field(default=None, kw_only=True)
    every: int = field(default=0, kw_only=True)
    """Steps between validations."""
    on_saved: Any = field(default=None, kw_only=True)
    """Called with (Progress, Path) after each checkpoint."""
    status: Status = field(default_factory=lambda: Status(state="loading"), kw_only=True)
    is_main: bool = field(default=True, kw_only=True)
    """Of several processes, the one that writes."""

    def tell(self, state: str, message: str = "", **values: Any) -> None:
        """A new state, or more about the present one."""
        self.status = replace(self.status, state=state, message=message, **values)
        self._write()
        if self.is_main:
            log.info("%s%s", state, f": {message}" if message else "")

    def working(self, message: str) -> None:
        """More about the present state, written now and then. Raises `Stopped` when that is wished."""
        if reason := self.stop_wanted():
            raise Stopped(f"{reason} while {self.status.state}")
        self.status = replace(self.status, message=message)
        if time.time() - self.status.updated > STATUS_SECONDS:
            self._write()

    def begin(self, progress: Progress, num_steps: int) -> None:
        super().begin(progress, num_steps)
        self._began, self._recent = time.monotonic(), deque(maxlen=50)
        self._board = self._summary_writer()
        self._logged = 0.0
        self.tell("training", step=progress.step, num_steps=num_steps, best_loss=progress.best, seconds_left=None)

    def stepped(self, record: dict[str, float]) -> None:
        super().stepped(record)
        self._recent.append(record["seconds"])
        step = int(record["step"])
        checked = [value for value in (self.status.best_loss, record.get("validation")) if value is not None]
        left = statistics.fmean(self._recent) * (self.status.num_steps - step)
        self.status = replace(
            self.status, step=step, loss=record["smoothed"], seconds_left=round(left, 1), message="",
            seconds=round(time.monotonic() - self._began, 1),
            pid=os.getpid(), best_loss=min(checked, default=None),
        )  # fmt: skip
        if time.time() - self.status.updated > STATUS_SECONDS:
            self._write()
        if self._bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("step %d of %d, loss %.4f, %.0f s left", step, self.status.num_steps, record["smoothed"], left)
        if self._board is not None:
            for name in record.keys() - {"step"}:
                self._board.add_scalar(name, record[name], step)

    def stop_wanted(self) -> str:
        if self.signals.received:
            return f"stopped by {self.signals.received}"
        return "stopped on request" if self.job.stop_wanted() else ""

    def validates(self, step: int) -> bool:
        return self.validation is not None and self.every > 0 and (step % self.every == 0 or step == self._last_step)

    def validate(self, step: int, model: torch.nn.Module) -> float | None:
        self.tell("training", "making samples")
        return self.validation.run(step, model, self._board)

    def saved(self, progress: Progress, path: Path) -> None:
        self._write()
        if self.on_saved is not None:
            self.on_saved(progress, path)

    def end(self) -> None:
        super().end()
        if self._board is not None:
            self._board.close()

    @property
    def _last_step(self) -> int:
        return self.status.num_steps

    def _write(self) -> None:
        if not self.is_main:
            return
        peak = peak_memory_bytes(self.device) or 0
        self.status = replace(self.status, updated=time.time(), peak_bytes=max(peak, self.status.peak_bytes))
        try:
            self.job.write_status(self.status)
        except OSError as error:
            # A full disk shall end training where it loses work, not where it cannot tell of it.
            log.warning("the status could not be written: %s", error)

    def _summary_writer(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard files: pip install tensorboard to have them; progress.jsonl holds the same")
            return None
        return SummaryWriter(str(self.job.folder / TENSORBOARD))
