"""The peak memory of one piece of work, not of all that the process has done before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from ..memory.peak import give_back_freed, peak_memory_bytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(work: Callable[[], object], device: torch.device) -> dict[str, int | str | None]:
    """Run `work` once: bytes at its peak, how many of them came on top of what was held, and what was measured.

    'stage' is the peak of this work alone; 'process' the highest of the process so far, where the system does not
    let it be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak_bytes": peak, "added_bytes": peak - held, "peak_of": "stage"}
    # What others left behind must not go while it is measured.
    gc.collect()
    give_back_freed()
    was_reset = _reset()
    held = _resident("VmRSS") if was_reset else None
    work()
    if not was_reset or held is None:
        return {"peak_bytes": peak_memory_bytes(device), "added_bytes": None, "peak_of": "process"}
    peak = _resident("VmHWM")
    return {"peak_bytes": peak, "added_bytes": peak - held, "peak_of": "stage"}


def _reset() -> bool:
    """Linux forgets the highest resident size when 5 is written there."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _resident(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    return None
