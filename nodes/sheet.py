"""Results side by side."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..kandinsky5_core.sheet import contact_sheet, spread

CATEGORY = "Kandinsky 5/sample"
ROWS = 10


class K5ContactSheet(io.ComfyNode):
    """Rows of labelled frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [
            io.Image.Input(
                f"images_{number}",
                optional=number > 1,
                tooltip="A row: pictures, or a clip of which some frames are shown.",
            )
            for number in range(1, ROWS + 1)
        ]
        return io.Schema(
            node_id="K5ContactSheet",
            display_name="Kandinsky 5 Contact Sheet",
            category=CATEGORY,
            description="Pictures or clips in labelled rows, to compare models, LoRAs or soups on the same seeds.",
            search_aliases=["image grid", "compare", "xy plot"],
            inputs=[
                *rows,
                io.String.Input(
                    "labels", default="", multiline=True, tooltip="A line of text for each connected row, from the top."
                ),
                io.Int.Input("columns", default=5, min=1, max=64, tooltip="Frames of a clip that are shown, evenly over it."),
                io.Int.Input("height", default=128, min=16, max=2048, step=8, tooltip="Of each picture, in pixels."),
            ],
            outputs=[io.Image.Output(display_name="sheet")],
        )

    @classmethod
    def execute(cls, labels: str = "", columns: int = 5, height: int = 128, **images: Any) -> io.NodeOutput:
        names = labels.splitlines()
        given = [images[f"images_{number}"] for number in range(1, ROWS + 1) if images.get(f"images_{number}") is not None]
        rows = [
            (names[number] if number < len(names) else "", spread(frames, columns)) for number, frames in enumerate(given)
        ]
        return io.NodeOutput(contact_sheet(rows, cell=height)[None])
