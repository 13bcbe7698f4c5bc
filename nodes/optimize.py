"""Patches on a MODEL: which attention the visual tokens use, and how much of it waits in CPU memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .bridge.attention import MODES, patch_attention
from .bridge.block_swap import swap_blocks

CATEGORY = "Kandinsky 5/optimize"


class K5Attention(io.ComfyNode):
    """Dense or NABLA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Attention",
            display_name="Kandinsky 5 Attention",
            category=CATEGORY,
            description="Chooses the attention between visual tokens. NABLA computes only the blocks of 8x8 patches that "
            "matter: about 2.7 times as fast for 10 seconds. Works on our MODEL and on Kandinsky 5 models of "
            "ComfyUI's own Load Diffusion Model.",
            search_aliases=["nabla", "sparse attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Kandinsky 5 MODEL."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="auto: as the checkpoint was trained. dense: all tokens. nabla: sparse.",
                ),
                io.Float.Input(
                    "mass",
                    default=0.9,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="nabla: share of attention that is kept; lower is faster. 0.9 for 10 s, 0.8 and 0.7 "
                    "for HD.",
                ),
                io.Int.Input(
                    "window_frames",
                    default=11,
                    min=1,
                    max=61,
                    step=2,
                    optional=True,
                    advanced=True,
                    tooltip="Neighbouring latent frames that are always attended to.",
                ),
                io.Int.Input(
                    "window_height",
                    default=3,
                    min=1,
                    max=31,
                    step=2,
                    optional=True,
                    advanced=True,
                    tooltip="The same in blocks.",
                ),
                io.Int.Input(
                    "window_width",
                    default=3,
                    min=1,
                    max=31,
                    step=2,
                    optional=True,
                    advanced=True,
                    tooltip="The same in blocks.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        mode: str = "auto",
        mass: float = 0.9,
        window_frames: int = 11,
        window_height: int = 3,
        window_width: int = 3,
    ) -> io.NodeOutput:
        return io.NodeOutput(patch_attention(model, mode, mass, (window_frames, window_height, window_width)))


class K5BlockSwap(io.ComfyNode):
    """Blocks that wait in CPU memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5BlockSwap",
            display_name="Kandinsky 5 Block Swap",
            category=CATEGORY,
            description="Keeps the weights of some blocks in CPU memory, from where ComfyUI brings them in ahead of their "
            "turn: room on the card for longer or larger clips. The result is the same, bit by bit. ComfyUI does it by "
            "itself where it finds too little room; this sets how much is kept free in any case.",
            search_aliases=["blockswap", "offload", "low vram", "out of memory", "blocks to swap"],
            inputs=[
                io.Model.Input("model", tooltip="A Kandinsky 5 MODEL."),
                io.Int.Input(
                    "blocks",
                    default=16,
                    min=0,
                    max=100,
                    tooltip="How many visual blocks wait: Lite has 32 (0.12 GB each in 16 bits), Pro 60 (0.61 GB), Image "
                    "Lite 50 (0.23 GB). 0: none.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, blocks: int = 16) -> io.NodeOutput:
        return io.NodeOutput(swap_blocks(model, blocks))
