"""Loaders: files or built-in models to ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..kandinsky5_core.config import Variant
from .bridge.clip import DEFAULT, K5CLIP, TEXT_WEIGHTS, load_clip
from .bridge.folders import AUTO, built_in, choices, doubt, find_auto, path_of, pick_variant, variant_choices
from .bridge.info import describe_file, describe_model
from .bridge.model import load_model
from .bridge.vae import K5VAE, load_vae

log = logging.getLogger(__name__)

CATEGORY = "Kandinsky 5/load"
DTYPES = ("default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "int8", "int8_fast")
MODEL_TIP = (
    "A Kandinsky 5 file of models/diffusion_models in any layout, or a built-in Nano model that needs no download."
)


def _dit_input() -> io.Input:
    return io.Combo.Input("model_name", options=choices("diffusion_models"), tooltip=MODEL_TIP)


def _variant_input() -> io.Input:
    return io.Combo.Input(
        "variant",
        options=variant_choices(),
        default=AUTO,
        optional=True,
        advanced=True,
        tooltip="What the file is, where one file serves several uses (Pro SD and HD). 'auto' reads it from the file.",
    )


def _dtype_input() -> io.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(DTYPES),
        default="default",
        optional=True,
        advanced=True,
        tooltip="Precision of the weights in memory. 'default' keeps a file's fp8 and else lets ComfyUI choose for your "
        "card; fp8 and int8 halve the blocks of a bf16 file, int8 with half of fp8's error; fast also multiplies in "
        "eight bits, where the card can.",
    )


def _text_weights_input() -> io.Input:
    return io.Combo.Input(
        "text_weights",
        options=list(TEXT_WEIGHTS),
        default=DEFAULT,
        optional=True,
        advanced=True,
        tooltip="How Qwen2.5-VL 7B is kept in memory. 'default': as its file is, 10 GB of an fp8 file and 17 of "
        "another. bf16: 17 GB. fp8 and int8: 10 GB, int8 more exact. nf4: 8 GB, coarser; it needs the "
        "package bitsandbytes and is moved to the card whole. ComfyUI brings in layer by layer what does not fit.",
    )


def open_dit(model_name: str, variant: str, weight_dtype: str) -> tuple[Any, Variant, str]:
    """A MODEL, the variant that it was found to be, and what the user should know of it."""
    import torch

    from ..kandinsky5_core.loading import DTYPES as TORCH_DTYPES

    dtypes = {**TORCH_DTYPES, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
    fast = weight_dtype.endswith("_fast")
    files = built_in(model_name)
    path = path_of("diffusion_models", model_name) if files is None else files.dit
    row = pick_variant(path, variant) if files is None else files.variant
    told = "" if files is not None else doubt(path, variant)
    if told:
        log.warning("Kandinsky 5: %s is taken for %s: %s", model_name, row.name, told)
    named = files is not None or variant != AUTO
    model = load_model(path, row, dtypes.get(weight_dtype.removesuffix("_fast")), named=named, fast=fast)
    return model, row, "\n".join(filter(None, (describe_model(row), told)))


def open_clip(text_encoder: str, clip_name: str, kind: str, text_weights: str = DEFAULT) -> K5CLIP:
    """Both text encoders; a built-in choice brings both."""
    files = built_in(text_encoder)
    if files is not None:
        kind = kind_of(files.variant)
        return load_clip(files.text_encoder, files.clip, kind, bundled=True, text_weights=text_weights)
    if built_in(clip_name) is not None:
        raise ValueError(f"clip_name '{clip_name}' is built in and text_encoder is a file; choose both of one family")
    paths = path_of("text_encoders", text_encoder), path_of("text_encoders", clip_name)
    return load_clip(*paths, kind, text_weights=text_weights)


def open_vae(vae_name: str) -> K5VAE:
    """A VAE of either class."""
    files = built_in(vae_name)
    return load_vae(path_of("vae", vae_name) if files is None else files.vae)


def kind_of(variant: Variant) -> str:
    """'video' or 'image': which text template the model was trained with."""
    return "video" if variant.vae.kind == "hunyuan" else "image"


class K5LoadModel(io.ComfyNode):
    """Load a DiT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5LoadModel",
            display_name="Load Kandinsky 5 Model",
            category=CATEGORY,
            is_output_node=False,
            description="Loads a Kandinsky 5 diffusion model and says which checkpoint it is.",
            search_aliases=["kandinsky", "unet loader", "diffusion model"],
            inputs=[_dit_input(), _variant_input(), _dtype_input()],
            outputs=[io.Model.Output(), io.String.Output(display_name="info", tooltip="The variant and its settings.")],
        )

    @classmethod
    def execute(cls, model_name: str, variant: str = AUTO, weight_dtype: str = "default") -> io.NodeOutput:
        model, _, info = open_dit(model_name, variant, weight_dtype)
        return io.NodeOutput(model, info, ui=ui.PreviewText(info))


class K5LoadTextEncoders(io.ComfyNode):
    """Load Qwen2.5-VL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5LoadTextEncoders",
            display_name="Load Kandinsky 5 Text Encoders",
            category=CATEGORY,
            description="Loads Qwen2.5-VL and CLIP ViT-L as one CLIP; text encode nodes then use the right template.",
            search_aliases=["dual clip loader", "qwen"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=choices("text_encoders"),
                    tooltip="Qwen2.5-VL 7B, for example qwen_2.5_vl_7b_fp8_scaled.safetensors; or built in.",
                ),
                io.Combo.Input(
                    "clip_name",
                    options=choices("text_encoders"),
                    tooltip="clip_l.safetensors; ignored where the text encoder is built in.",
                ),
                io.Combo.Input(
                    "type",
                    options=["video", "image"],
                    default="video",
                    tooltip="Which template plain text encode nodes use: that of the model you sample with.",
                ),
                _text_weights_input(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls, text_encoder: str, clip_name: str, type: str, text_weights: str = DEFAULT
    ) -> io.NodeOutput:
        return io.NodeOutput(open_clip(text_encoder, clip_name, type, text_weights))


class K5LoadVAE(io.ComfyNode):
    """Load either VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5LoadVAE",
            display_name="Load Kandinsky 5 VAE",
            category=CATEGORY,
            description="Loads the HunyuanVideo VAE (video models) or the FLUX VAE (image models), in any layout.",
            search_aliases=["vae loader"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=choices("vae"),
                    tooltip="hunyuan_video_vae_bf16.safetensors for video, ae.safetensors for images.",
                )
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(open_vae(vae_name))


class K5LoadAll(io.ComfyNode):
    """Model, text encoders and VAE at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        auto = "'auto' takes the one that fits: built in with a built-in model, else the usual file name."
        return io.Schema(
            node_id="K5LoadAll",
            display_name="Load Kandinsky 5 (all)",
            category=CATEGORY,
            description="Loads model, text encoders and VAE; with 'auto' the parts that fit the model are found by name.",
            search_aliases=["kandinsky", "checkpoint loader"],
            inputs=[
                _dit_input(),
                io.Combo.Input(
                    "text_encoder",
                    options=[AUTO, *choices("text_encoders")],
                    default=AUTO,
                    tooltip=f"Qwen2.5-VL. {auto}",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "clip_name",
                    options=[AUTO, *choices("text_encoders")],
                    default=AUTO,
                    tooltip=f"CLIP ViT-L. {auto}",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "vae_name",
                    options=[AUTO, *choices("vae")],
                    default=AUTO,
                    tooltip=f"VAE. {auto}",
                    optional=True,
                    advanced=True,
                ),
                _variant_input(),
                _dtype_input(),
                _text_weights_input(),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                io.String.Output(display_name="info", tooltip="The variant and its settings."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        text_encoder: str = AUTO,
        clip_name: str = AUTO,
        vae_name: str = AUTO,
        variant: str = AUTO,
        weight_dtype: str = "default",
        text_weights: str = DEFAULT,
    ) -> io.NodeOutput:
        parts = find_auto(model_name, text_encoder=text_encoder, clip_name=clip_name, vae_name=vae_name)
        model, row, info = open_dit(model_name, variant, weight_dtype)
        clip = open_clip(parts["text_encoder"], parts["clip_name"], kind_of(row), text_weights)
        vae = open_vae(parts["vae_name"])
        if vae.config.kind != row.vae.kind:
            raise ValueError(
                f"vae_name '{parts['vae_name']}' is a {vae.config.kind} VAE and {row.name} needs {row.vae.kind}: "
                "hunyuan_video_vae for video, the FLUX VAE (ae) for images"
            )
        return io.NodeOutput(model, clip, vae, info, ui=ui.PreviewText(info))


class K5ModelInfo(io.ComfyNode):
    """What a file is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ModelInfo",
            display_name="Kandinsky 5 Model Info",
            category=CATEGORY,
            is_output_node=True,
            description="Reads only the header of a weights file and says what it is.",
            inputs=[_dit_input()],
            outputs=[io.String.Output(display_name="info")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        files = built_in(model_name)
        path: Path = path_of("diffusion_models", model_name) if files is None else files.dit
        info = describe_file(path)
        return io.NodeOutput(info, ui=ui.PreviewText(info))
