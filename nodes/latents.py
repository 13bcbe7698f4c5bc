"""Empty latents, image to video with keyframes, and going on from a clip."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .bridge.frames import GivenFrames, empty_latent, fitted, join_clips, keyframe_list, require_variant, with_given

CATEGORY = "Kandinsky 5/latents"


def _size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=2048,
            step=16,
            tooltip="Pixels, a multiple of 16 (128 is best for NABLA). 0: the variant's own, or the image's ratio.",
        ),
        io.Int.Input("height", default=0, min=0, max=2048, step=16, tooltip="Pixels, a multiple of 16. 0: as width."),
        io.Int.Input(
            "frames",
            default=0,
            min=0,
            max=1025,
            step=1,
            tooltip="4k+1: 121 is 5 s and 241 is 10 s at 24 frames a second. 0: the variant's own.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Results at once, with consecutive seeds."),
    ]


class K5EmptyLatent(io.ComfyNode):
    """Noise of the variant's shape."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5EmptyLatent",
            display_name="Kandinsky 5 Empty Latent",
            category=CATEGORY,
            description="An empty latent for text to video or text to image, in the sizes and lengths of the model.",
            search_aliases=["empty latent video", "empty latent image"],
            inputs=[io.Model.Input("model", tooltip="Gives sizes, length and kind of latent."), *_size_inputs()],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, width: int = 0, height: int = 0, frames: int = 0, batch_size: int = 1
    ) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(require_variant(model), height, width, frames, batch_size))


class K5ImageToVideo(io.ComfyNode):
    """First frame, last frame, keyframes, loop."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ImageToVideo",
            display_name="Kandinsky 5 Image to Video",
            category=CATEGORY,
            description="Holds pictures at chosen frames of the clip. The released models were trained on the first "
            "frame; other places work to the extent that they generalise.",
            search_aliases=["i2v", "first last frame", "keyframes", "loop"],
            inputs=[
                io.Model.Input("model", tooltip="An image to video checkpoint."),
                io.Conditioning.Input("positive", tooltip="From Kandinsky 5 Prompts or CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The same for what should not be seen."),
                io.Vae.Input("vae", tooltip="The video VAE."),
                *_size_inputs(),
                io.Image.Input("start_image", optional=True, tooltip="The first frame."),
                io.Image.Input("end_image", optional=True, tooltip="The last frame."),
                io.Image.Input("keyframes", optional=True, tooltip="A batch of pictures for the frames named below."),
                io.String.Input(
                    "keyframe_positions",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A frame number for each picture of keyframes, such as 0, 60, -1.",
                ),
                io.Boolean.Input(
                    "loop",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="End on the first picture; drop the last 4 frames of the result to play it round.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        width: int = 0,
        height: int = 0,
        frames: int = 0,
        batch_size: int = 1,
        start_image: Any = None,
        end_image: Any = None,
        keyframes: Any = None,
        keyframe_positions: str = "",
        loop: bool = False,
    ) -> io.NodeOutput:
        given = keyframe_list(start_image, end_image, keyframes, keyframe_positions, loop=loop)
        held = GivenFrames.of_pictures(require_variant(model), vae, given, height, width, frames)
        return io.NodeOutput(*with_given(held, positive, negative), held.empty(batch_size))


class K5ExtendVideo(io.ComfyNode):
    """A clip that goes on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ExtendVideo",
            display_name="Kandinsky 5 Extend Video",
            category=CATEGORY,
            description="The clip's last frames become the held beginning of the next piece; join the two afterwards.",
            search_aliases=["long video", "continue"],
            inputs=[
                io.Model.Input("model", tooltip="An image to video checkpoint."),
                io.Conditioning.Input("positive", tooltip="The prompt of the next piece."),
                io.Conditioning.Input("negative", tooltip="What should not be seen."),
                io.Vae.Input("vae", tooltip="The video VAE."),
                io.Image.Input("clip", tooltip="All frames so far."),
                io.Int.Input(
                    "frames", default=0, min=0, max=1025, tooltip="Of the piece, overlap included. 0: the variant's."
                ),
                io.Int.Input(
                    "overlap",
                    default=5,
                    min=1,
                    max=33,
                    step=4,
                    tooltip="Last frames the model sees, 4k+1. 1 is what the released models were trained for.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, vae: Any, clip: Any, frames: int = 0, overlap: int = 5
    ) -> io.NodeOutput:
        held = GivenFrames.of_clip(require_variant(model), vae, clip, overlap, frames)
        return io.NodeOutput(*with_given(held, positive, negative), held.empty(1))


class K5JoinVideo(io.ComfyNode):
    """Old clip and new piece as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5JoinVideo",
            display_name="Kandinsky 5 Join Video",
            category=CATEGORY,
            description="Appends a piece made with Extend Video to its clip, faded over the overlap.",
            inputs=[
                io.Image.Input("clip", tooltip="All frames so far."),
                io.Image.Input("piece", tooltip="Frames made with Extend Video; it begins with the overlap."),
                io.Int.Input("overlap", default=5, min=1, max=33, step=4, tooltip="As in Extend Video."),
            ],
            outputs=[io.Image.Output(display_name="clip")],
        )

    @classmethod
    def execute(cls, clip: torch.Tensor, piece: torch.Tensor, overlap: int = 5) -> io.NodeOutput:
        if len(piece) <= overlap or len(clip) < overlap:
            raise ValueError(f"overlap {overlap} does not fit a clip of {len(clip)} and a piece of {len(piece)} frames")
        return io.NodeOutput(join_clips(fitted(clip, tuple(piece.shape[1:3])), piece, overlap))
