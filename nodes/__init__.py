"""The nodes: an explicit list, in groups that can fail alone."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

log = logging.getLogger(__name__)

GROUPS: dict[str, tuple[str, ...]] = {
    "load": ("K5LoadModel", "K5LoadTextEncoders", "K5LoadVAE", "K5LoadAll", "K5ModelInfo"),
    "text": ("K5EncodePrompts", "K5EnhancePrompt"),
    "latents": ("K5EmptyLatent", "K5ImageToVideo", "K5ExtendVideo", "K5JoinVideo"),
    "edit": ("K5EditConditioning", "K5Inpaint", "K5PasteBack"),
    "sample": ("K5Sample", "K5Schedule", "K5Shift"),
    "decode": ("K5DecodeVideo",),
    "optimize": ("K5Attention", "K5BlockSwap"),
    "plan": ("K5Plan",),
    "step_cache": ("K5StepCache",),
    "lora": ("K5LoadLora",),
    "lora_tools": ("K5MergeLora", "K5ExtractLora", "K5ResizeLora", "K5ConvertLora", "K5LoraInfo"),
    "soup": ("K5Soup", "K5SoupFolder"),
    "sheet": ("K5ContactSheet",),
    "train": ("K5TrainingData", "K5CacheData", "K5TrainingSettings", "K5StartTraining"),
    "jobs": ("K5WaitForTraining", "K5TrainingStatus", "K5LoadTrained"),
    "nano": ("K5NanoPicture",),
}
"""Module to the nodes in it."""


def load_nodes() -> list[type]:
    """Every node whose module can be imported; the others are named in one log line each."""
    found: list[type] = []
    for group, names in GROUPS.items():
        try:
            module = importlib.import_module(f".{group}", __name__)
        except ImportError as error:
            log.warning("Kandinsky 5: nodes %s are off: %s; %s", ", ".join(names), error, _advice(error))
            continue
        found += [getattr(module, name) for name in names]
    return found


def serve_panel() -> None:
    """The routes behind the side panel of jobs; without them the nodes work all the same."""
    try:
        from .bridge.routes import serve_jobs
    except ImportError as error:
        log.warning("Kandinsky 5: the jobs panel is off: %s; %s", error, _advice(error))
        return
    serve_jobs()


def _advice(error: ImportError) -> str:
    return f"install it with: pip install {error.name}" if error.name else "reinstall the pack's requirements.txt"


def make_extension() -> object:
    """ComfyUI's extension object."""
    from comfy_api.latest import ComfyExtension

    from .bridge.help_pages import serve_help

    class Kandinsky5Extension(ComfyExtension):
        async def on_load(self) -> None:
            serve_help(Path(__file__).parents[1])
            serve_panel()

        async def get_node_list(self) -> list[type]:
            return load_nodes()

    return Kandinsky5Extension()
