"""Latents to frames and VIDEO."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from comfy_api.latest import InputImpl, Types, io

from .bridge.decode import decode_latent

CATEGORY = "Kandinsky 5/latents"


class K5DecodeVideo(io.ComfyNode):
    """LATENT to VIDEO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5DecodeVideo",
            display_name="Kandinsky 5 Decode Video",
            category=CATEGORY,
            description="Decodes a LATENT to frames and a VIDEO for Save Video, within a memory budget.",
            search_aliases=["vae decode", "create video"],
            inputs=[
                io.Latent.Input("latent", tooltip="From a sampler."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames a second: 24 for the released models, 8 for nano-video.",
                ),
                io.Float.Input(
                    "tile_budget",
                    default=4.0,
                    min=0.25,
                    max=128.0,
                    step=0.25,
                    optional=True,
                    advanced=True,
                    tooltip="GiB that decoding may take beside the model: it decides whether the clip is decoded at once, layer "
                    "by layer, a few frames at a time or in tiles. Equal budgets give equal results.",
                ),
                io.Int.Input(
                    "row",
                    default=0,
                    min=0,
                    max=63,
                    optional=True,
                    advanced=True,
                    tooltip="Which result of a batch becomes the VIDEO.",
                ),
            ],
            outputs=[io.Video.Output(), io.Image.Output(display_name="frames", tooltip="All frames, of all rows.")],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], vae: Any, fps: float = 24.0, tile_budget: float = 4.0, row: int = 0
    ) -> io.NodeOutput:
        frames = decode_latent(latent["samples"], vae, int(tile_budget * 2**30))
        if row >= len(frames):
            raise ValueError(f"row {row} is beyond the batch of {len(frames)}; rows count from 0")
        parts = Types.VideoComponents(images=frames[row], frame_rate=Fraction(fps).limit_denominator(1001))
        return io.NodeOutput(InputImpl.VideoFromComponents(parts), frames.flatten(0, 1))
