"""What it was measured on, and how fast that multiplies matrices."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

from ..config import DiTConfig

MATMUL_ROWS = {"cpu": 1024}
MATMUL_ROWS_ELSEWHERE = 16_384


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Software, device and threads, as plain JSON values."""
    known: dict[str, object] = {
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
        "architecture": platform.machine(), "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known["accelerator"], known["accelerator_gib"] = card.name, round(card.total_memory / 2**30, 1)
        known["capability"] = f"{card.major}.{card.minor}"
        known["cuda"], known["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    else:
        known["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return known


def matmul(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """The multiplication that a feed-forward layer of the DiT does, and its floating-point operations."""
    rows = MATMUL_ROWS.get(device.type, MATMUL_ROWS_ELSEWHERE)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, config.model_dim, generator=generator).to(device, dtype)
    right = torch.randn(config.ff_dim, config.model_dim, generator=generator).to(device, dtype)
    return lambda: left @ right.T, 2 * rows * config.model_dim * config.ff_dim
