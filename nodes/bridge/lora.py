"""LoRA files onto a MODEL through ComfyUI's own patching."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora

from ...kandinsky5_core.weights.lora import read_lora
from .folders import files, path_of

log = logging.getLogger(__name__)

NONE = "none"


def lora_choices() -> list[str]:
    """Files of models/loras."""
    return files("loras")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of one file."""

    line: str
    trigger: str


def apply_lora(model: Any, name: str, strength: float) -> tuple[Any, Applied]:
    """A clone of the MODEL with the LoRA patched in.

    Raises:
        ValueError: none of its keys fits the model.
    """
    return apply_file(model, path_of("loras", name), strength)


def apply_file(model: Any, path: Path, strength: float) -> tuple[Any, Applied]:
    """The same for any file."""
    prefix = "diffusion_model."
    shapes = {
        key[len(prefix) : -len(".weight")]: tuple(weight.shape)
        for key, weight in model.model.state_dict().items()
        if key.startswith(prefix) and key.endswith(".weight")
    }
    lora = read_lora(path, shapes)
    key_map = {module: f"{prefix}{module}.weight" for module in shapes}
    patched = model.clone()
    applied = patched.add_patches(comfy.lora.load_lora(lora.tensors, key_map, log_missing=False), strength)
    line = f"{path.name}: {len(applied)} layers at strength {strength:g}, rank {lora.rank}"
    if lora.unmatched:
        line += f"; {len(lora.unmatched)} keys do not fit this model, such as {lora.unmatched[0]}"
        log.warning("Kandinsky 5: %s", line)
    if lora.trigger:
        line += f"; trigger: {lora.trigger}"
    return patched, Applied(line=line, trigger=lora.trigger)
