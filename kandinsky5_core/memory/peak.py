"""How much memory a run has taken."""

from __future__ import annotations

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
