"""Progress into ComfyUI's bar, and its cancel button out of it."""

from __future__ import annotations

import sys

import comfy.model_management
import comfy.utils

OUT_OF_MEMORY = comfy.model_management.OOM_EXCEPTION


class TokenProgress:
    """For the core's `on_token`: moves the bar and stops where the user cancelled."""

    def __init__(self, total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total)

    def __call__(self, count: int) -> None:
        """After each token."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(count)


class TensorProgress:
    """For the core's `on_tensor`: the same between tensors of a file that is written."""

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        """After each tensor."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total)


def tell_node(text: str, node_id: str | None) -> None:
    """Show a line on a node while other nodes run; nothing without a server."""
    module = sys.modules.get("server")
    server = getattr(module.PromptServer, "instance", None) if module else None
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)
