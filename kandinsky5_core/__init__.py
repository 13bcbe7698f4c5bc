"""Kandinsky 5.0 in PyTorch: `load` the models, `generate` frames.

from kandinsky5_core import Request, generate, load
result = generate(load("nano-video"), Request(prompt="a red circle moves left on a black background"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loading import load
    from .pipeline import Models, Result, generate
    from .request import Request

__version__ = "0.1.0"
__all__ = ["Models", "Request", "Result", "generate", "load"]


def __getattr__(name: str) -> object:
    # Importing torch takes seconds, which `kandinsky5 --help` and ComfyUI's start should not pay for.
    if name == "load":
        from .loading import load

        return load
    if name == "Request":
        from .request import Request

        return Request
    if name in ("Models", "Result", "generate"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
