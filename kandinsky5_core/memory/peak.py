"""How much memory a run has taken, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak of the device's allocator, or of the process on the CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().peak_wset


def give_back_freed() -> None:
    """Freed CPU memory back to the system where glibc holds it between pieces in use; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library, which has no such call
