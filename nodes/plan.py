"""What a job will need, before anything is loaded."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kandinsky5_core.config import VARIANTS
from .bridge.planning import free_memory_gib, plan_text

CATEGORY = "Kandinsky 5/optimize"


class K5Plan(io.ComfyNode):
    """Memory of each stage, and the settings that fit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Plan",
            display_name="Kandinsky 5 Memory Plan",
            category=CATEGORY,
            is_output_node=True,
            description="Says what a job will need in each stage, and which settings fit it into a card. "
            "Nothing is loaded.",
            search_aliases=["vram", "memory", "planner", "out of memory"],
            inputs=[
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="lite-t2v-5s-sft",
                    tooltip="The checkpoint that you mean to use; it need not be there.",
                ),
                io.Int.Input("width", default=768, min=16, max=4096, step=16, tooltip="Pixels."),
                io.Int.Input("height", default=512, min=16, max=4096, step=16, tooltip="Pixels."),
                io.Int.Input("frames", default=121, min=1, max=961, step=4, tooltip="4k+1; images have 1."),
                io.Int.Input("batch", default=1, min=1, max=64, tooltip="Clips at once."),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    tooltip="Memory of the card in GB. 0: what is free on this one now; without a card, a table of "
                    "all usual sizes.",
                ),
            ],
            outputs=[io.String.Output(display_name="plan", tooltip="The table and the settings as text.")],
        )

    @classmethod
    def execute(cls, variant: str, width: int, height: int, frames: int, batch: int, budget: float) -> io.NodeOutput:
        text = plan_text(variant, width, height, frames, batch, budget or free_memory_gib())
        return io.NodeOutput(text, ui=ui.PreviewText(text))
