"""Progress into ComfyUI's bar, and its cancel button out of it."""

from __future__ import annotations

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
