"""What a stage has found so far: written as JSON with every figure, so that nothing is lost where a stage is cut."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


class TooLittleTimeError(Exception):
    """A part would not end within the stage's time."""


class Notes:
    """Facts, rows of tables, what was skipped and what failed, of one stage."""

    def __init__(self, path: Path | None, seconds: float = float("inf")) -> None:
        """
        Args:
            path: File to keep up to date; None keeps them in memory alone.
            seconds: Time that the stage has.
        """
        self.path, self.ends = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {"facts": {}, "tables": {}, "skipped": {}, "errors": {}}

    def fact(self, name: str, value: object) -> None:
        """One figure."""
        self.found["facts"][name] = value
        self._write()

    def row(self, table: str, values: dict[str, object]) -> None:
        """A line more in a table."""
        self.found["tables"].setdefault(table, []).append(values)
        self._write()

    def skip(self, what: str, why: str) -> None:
        """What is not measured here, and why."""
        self.found["skipped"][what] = why
        self._write()

    def has(self, package: str) -> bool:
        """Whether a package is installed; where it is not, that is noted."""
        if importlib.util.find_spec(package) is not None:
            return True
        self.skip(package, "not installed")
        return False

    def left(self) -> float:
        """Seconds that the stage has left."""
        return self.ends - time.monotonic()

    def need(self, seconds: float) -> None:
        """Go on only if there is so much time.

        Raises:
            TooLittleTimeError: there is not.
        """
        if self.left() < seconds:
            raise TooLittleTimeError(f"takes about {seconds:.0f} s, and {max(0.0, self.left()):.0f} s were left")

    def attempt(self, what: str, work: Callable[[], Made], *, needs: float = 0) -> Made | None:
        """The result of `work`; None, with the error noted, where it fails: the rest of the stage goes on.

        Args:
            needs: Seconds, below which it is skipped.
        """
        try:
            self.need(needs)
            return work()
        except TooLittleTimeError as late:
            self.skip(what, f"too little time: it {late}")
        except Exception as error:  # Whatever a device, a compiler or a package raises.
            traceback.print_exc(file=sys.stderr)
            self.found["errors"][what] = told(error)
            self._write()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _write(self) -> None:
        if self.path is None:
            return
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")
        aside.replace(self.path)


def told(error: BaseException) -> str:
    """An error on one line of bounded length."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:400]
