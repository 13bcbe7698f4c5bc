"""What a model is, in a few lines that a user can read."""

from __future__ import annotations

from pathlib import Path

from ...kandinsky5_core.config import Variant
from ...kandinsky5_core.weights.detect import inspect_file


def describe_model(variant: Variant) -> str:
    """Name, tasks and the settings that it was made for."""
    sampling = variant.sampling
    sizes = ", ".join(f"{width}x{height}" for height, width in variant.resolutions)
    attention = "dense" if variant.nabla is None else f"NABLA, mass {variant.nabla.mass}"
    lines = [
        f"{variant.name} ({variant.family}): {', '.join(variant.tasks)}",
        f"{sampling.num_steps} steps, guidance {sampling.guidance_scale:g}, shift {sampling.shift:g}, {attention}",
        f"sizes {sizes}",
    ]
    if variant.num_frames > 1:
        lines.append(f"{variant.num_frames} frames, {variant.fps} a second; frames are 4k+1")
    return "\n".join(lines)


def describe_file(path: Path) -> str:
    """Everything that `kandinsky5 info` says, a line each."""
    values = inspect_file(path).to_dict()
    return "\n".join(f"{name}: {value}" for name, value in values.items() if value not in (None, "", [], {}))
