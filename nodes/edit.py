"""Instruct editing, inpainting and outpainting."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..kandinsky5_core.text.templates import EDIT_TEMPLATES
from .bridge.frames import require_variant
from .bridge.pictures import edit_inputs, inpaint_inputs, paste_back
from .text import encode_pair

CATEGORY = "Kandinsky 5/edit"


class K5EditConditioning(io.ComfyNode):
    """An instruction and the picture it is about."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5EditConditioning",
            display_name="Kandinsky 5 Edit Image",
            category=CATEGORY,
            description="Encodes an instruction together with the picture to edit, for the Image Editing model: the "
            "picture goes into the source channels and before Qwen, in both passes of guidance.",
            search_aliases=["instruct edit", "i2i", "image editing"],
            inputs=[
                io.Model.Input("model", tooltip="An Image Editing checkpoint."),
                io.Clip.Input("clip", tooltip="From a Kandinsky 5 loader."),
                io.Vae.Input("vae", tooltip="The FLUX VAE."),
                io.Image.Input("image", tooltip="The picture to edit; the first of a batch."),
                io.String.Input("instruction", multiline=True, dynamic_prompts=True, tooltip="What to change."),
                io.String.Input("negative", multiline=True, default="", tooltip="Usually empty."),
                io.Combo.Input(
                    "fit",
                    options=["cover", "keep"],
                    default="cover",
                    tooltip="cover: scaled and cropped to the nearest size of the model. keep: all of it, at "
                    "its own size rounded up to 16 pixels.",
                ),
                io.Combo.Input(
                    "edit_template",
                    options=list(EDIT_TEMPLATES),
                    default="snapshot",
                    optional=True,
                    advanced=True,
                    tooltip="Text around the instruction. Which one the weights saw is not published.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="Results at once, with consecutive seeds."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(),
                io.Image.Output(display_name="source", tooltip="The picture as the model sees it."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        image: Any,
        instruction: str,
        negative: str = "",
        fit: str = "cover",
        edit_template: str = "snapshot",
        batch_size: int = 1,
    ) -> io.NodeOutput:
        edit = edit_inputs(require_variant(model), vae, image, fit, batch_size)
        pair = encode_pair(clip, instruction, negative, "i2i", edit_template, edit.shown)
        return io.NodeOutput(*edit.with_source(*pair), edit.latent, edit.shown)


class K5Inpaint(io.ComfyNode):
    """What may change of a picture or clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Inpaint",
            display_name="Kandinsky 5 Inpaint / Outpaint",
            category=CATEGORY,
            description="Makes a LATENT of a picture or clip in which only the masked part, and what is painted around "
            "it, may change. Paste the result back to keep every other pixel as it was.",
            search_aliases=["mask", "outpaint", "extend canvas"],
            inputs=[
                io.Model.Input("model", tooltip="Gives sizes and kind of latent."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Image.Input("image", tooltip="The picture, or the frames of a clip."),
                io.Mask.Input("mask", optional=True, tooltip="White is made anew; one for all frames or one for each."),
                io.Int.Input(
                    "grow", default=0, min=-256, max=256, tooltip="Pixels that the mask grows by; negative shrinks."
                ),
                io.Int.Input(
                    "feather", default=0, min=0, max=256, tooltip="Pixels over which old and new are blended."
                ),
                io.Int.Input("left", default=0, min=0, max=2048, tooltip="Pixels to paint on the left."),
                io.Int.Input("top", default=0, min=0, max=2048, tooltip="Pixels to paint above."),
                io.Int.Input("right", default=0, min=0, max=2048, tooltip="Pixels to paint on the right."),
                io.Int.Input("bottom", default=0, min=0, max=2048, tooltip="Pixels to paint below."),
            ],
            outputs=[
                io.Latent.Output(),
                io.Image.Output(display_name="base", tooltip="The picture, with its edges repeated."),
                io.Mask.Output(display_name="alpha", tooltip="Where the result replaces the base."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        image: Any,
        mask: Any = None,
        grow: int = 0,
        feather: int = 0,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
    ) -> io.NodeOutput:
        made = inpaint_inputs(
            require_variant(model), vae, image, mask, grow=grow, feather=feather, outpaint=(left, top, right, bottom)
        )
        return io.NodeOutput(made.latent, made.base, made.alpha)


class K5PasteBack(io.ComfyNode):
    """The kept pixels back in place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5PasteBack",
            display_name="Kandinsky 5 Paste Back",
            category=CATEGORY,
            description="Puts the result into the picture at the picture's own size; outside the mask every pixel stays.",
            search_aliases=["composite", "stitch"],
            inputs=[
                io.Image.Input("image", tooltip="The decoded result."),
                io.Image.Input("base", tooltip="From Inpaint / Outpaint."),
                io.Mask.Input("alpha", tooltip="From Inpaint / Outpaint."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: Any, base: Any, alpha: Any) -> io.NodeOutput:
        return io.NodeOutput(paste_back(image, base, alpha))
