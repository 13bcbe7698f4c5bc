"""A drawn picture of the Nano language, so that every workflow runs without a file."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.drawing import drawn

CATEGORY = "Kandinsky 5/nano"


class K5NanoPicture(io.ComfyNode):
    """What the built-in models know."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5NanoPicture",
            display_name="Kandinsky 5 Nano Picture",
            category=CATEGORY,
            description="Draws a sentence of the language that the built-in Nano models know, as a picture or as a clip "
            "when it moves. Replace it by Load Image for your own pictures.",
            search_aliases=["example image", "test picture"],
            inputs=[
                io.String.Input(
                    "sentence",
                    default="a big red circle on a gray background",
                    tooltip="a {small|big} {red|green|blue|yellow|purple|white} {circle|square|triangle} [moves "
                    "{left|right|up|down}] on a {black|gray|navy|brown} background",
                ),
                io.Int.Input("width", default=64, min=32, max=512, step=16, tooltip="Pixels."),
                io.Int.Input("height", default=64, min=32, max=512, step=16, tooltip="Pixels."),
                io.Int.Input(
                    "frames", default=1, min=1, max=65, tooltip="1 is a picture; 17 is what nano-video makes."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True, tooltip="Another place."
                ),
            ],
            outputs=[io.Image.Output(), io.Mask.Output(tooltip="White where the shape is.")],
        )

    @classmethod
    def execute(cls, sentence: str, width: int, height: int, frames: int = 1, seed: int = 0) -> io.NodeOutput:
        return io.NodeOutput(*drawn(sentence, height, width, frames, seed))
