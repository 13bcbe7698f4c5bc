"""Patches on a MODEL: which attention the visual tokens use."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .bridge.attention import MODES, patch_attention

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
