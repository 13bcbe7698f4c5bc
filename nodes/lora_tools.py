"""The LoRA toolbox: bake in, extract, change rank, convert, describe; from file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..kandinsky5_core.weights import lora_tools
from .bridge.folders import files, path_of
from .bridge.progress import TensorProgress
from .bridge.results import (
    NEW,
    FileName,
    Result,
    base_input,
    lora_input,
    model_path,
    name_input,
    result_file,
    stamp,
)

CATEGORY = "Kandinsky 5/lora"
LAYOUTS = {"ComfyUI": "comfyui", "diffusers": "diffusers", "official": "official", "kohya": "kohya"}
LAYOUT_TIP = (
    "Key names: ComfyUI and kohya for ComfyUI's loaders, diffusers for diffusers, official for kandinsky-5 code; "
    "this pack reads all."
)
SAME = "as in the file"


def _outputs() -> list[io.Output]:
    return [
        FileName.Output(display_name="name", tooltip="Of the new file, for a loader's drop-down or a text input."),
        io.String.Output(display_name="report", tooltip="What was done."),
    ]


def _done(result: Result, told: dict[str, Any] | None) -> io.NodeOutput:
    """The outputs of a tool: the file's name and a line for each value."""
    if told is None:
        report = f"{result.name} was there and stays as it is; nothing was made"
    else:
        values = {"file": result.name, **{key: value for key, value in told.items() if key != "target"}}
        report = "\n".join(f"{key}: {value}" for key, value in values.items())
    return io.NodeOutput(result.name, report, ui=ui.PreviewText(report))


class K5MergeLora(io.ComfyNode):
    """A LoRA into a model file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5MergeLora",
            display_name="Bake Kandinsky 5 LoRA into a Model",
            category=CATEGORY,
            is_output_node=True,
            description="Writes a new model file with the LoRA in its weights, tensor by tensor, so that the size of the "
            "model does not matter.",
            search_aliases=["merge lora", "fuse lora"],
            inputs=[
                base_input(),
                lora_input(),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="1 as trained; negative turns it round."
                ),
                *name_input("kandinsky5-with-lora", "diffusion_models"),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, base: str, lora: str, strength: float = 1.0, name: str = "", existing: str = NEW
    ) -> io.NodeOutput:
        base_path, lora_path = model_path(base), path_of("loras", lora)
        result = result_file("diffusion_models", name, existing)
        if result.kept:
            return _done(result, None)
        told = lora_tools.merge_lora(base_path, lora_path, result.path, strength=strength, on_tensor=TensorProgress())
        return _done(result, told)

    @classmethod
    def fingerprint_inputs(cls, base: str = "", lora: str = "", **rest: Any) -> object:
        """Runs again when a file was written anew."""
        return _stamps(model_path, base) + _stamps(_lora_path, lora)


class K5ExtractLora(io.ComfyNode):
    """A LoRA out of two model files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ExtractLora",
            display_name="Extract Kandinsky 5 LoRA from Models",
            category=CATEGORY,
            is_output_node=True,
            description="The difference of a fine-tune from its base as a LoRA, by SVD of each layer; tells how much of it "
            "the rank keeps.",
            search_aliases=["svd", "lora from checkpoint", "model difference"],
            inputs=[
                base_input(),
                io.Combo.Input(
                    "tuned", options=files("diffusion_models"), tooltip="The fine-tune: a file of models/diffusion_models."
                ),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="How much the LoRA can hold; its size grows with it."),
                io.Combo.Input("layout", options=list(LAYOUTS), default="ComfyUI", tooltip=LAYOUT_TIP),
                *name_input("extracted", "loras"),
                io.String.Input(
                    "trigger", default="", optional=True, advanced=True, tooltip="Words for prompts, kept in the file."
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, base: str, tuned: str, rank: int = 32, layout: str = "ComfyUI", name: str = "", trigger: str = "",
        existing: str = NEW,
    ) -> io.NodeOutput:  # fmt: skip
        base_path, tuned_path = model_path(base), path_of("diffusion_models", tuned)
        result = result_file("loras", name, existing)
        if result.kept:
            return _done(result, None)
        told = lora_tools.extract_lora(
            base_path, tuned_path, result.path, rank=rank, layout=LAYOUTS[layout], trigger=trigger.strip(),
            on_tensor=TensorProgress(),
        )  # fmt: skip
        return _done(result, told)

    @classmethod
    def fingerprint_inputs(cls, base: str = "", tuned: str = "", **rest: Any) -> object:
        """Runs again when a file was written anew."""
        return _stamps(model_path, base) + _stamps(model_path, tuned)


class K5ResizeLora(io.ComfyNode):
    """A LoRA at another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ResizeLora",
            display_name="Change Rank of Kandinsky 5 LoRA",
            category=CATEGORY,
            is_output_node=True,
            description="The nearest LoRA of another rank, by SVD; tells how much of it the rank keeps.",
            search_aliases=["resize lora", "shrink lora", "svd"],
            inputs=[
                lora_input(),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Of the result. A larger one only takes more room."),
                io.Combo.Input("layout", options=[SAME, *LAYOUTS], default=SAME, tooltip=LAYOUT_TIP),
                *name_input("resized", "loras"),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, lora: str, rank: int = 16, layout: str = SAME, name: str = "", existing: str = NEW
    ) -> io.NodeOutput:
        path = path_of("loras", lora)
        result = result_file("loras", name, existing)
        if result.kept:
            return _done(result, None)
        told = lora_tools.resize_lora(
            path, result.path, rank=rank, layout=LAYOUTS.get(layout), on_tensor=TensorProgress()
        )
        return _done(result, told)

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **rest: Any) -> object:
        """Runs again when the file was written anew."""
        return _stamps(_lora_path, lora)


class K5ConvertLora(io.ComfyNode):
    """A LoRA under other key names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5ConvertLora",
            display_name="Convert Kandinsky 5 LoRA",
            category=CATEGORY,
            is_output_node=True,
            description="Writes a LoRA with the key names of another program; what it adds to the weights stays the same.",
            search_aliases=["peft", "kohya", "diffusers", "lora format"],
            inputs=[
                lora_input(),
                io.Combo.Input("layout", options=list(LAYOUTS), default="ComfyUI", tooltip=LAYOUT_TIP),
                *name_input("converted", "loras"),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, lora: str, layout: str = "ComfyUI", name: str = "", existing: str = NEW) -> io.NodeOutput:
        path = path_of("loras", lora)
        result = result_file("loras", name, existing)
        if result.kept:
            return _done(result, None)
        told = lora_tools.convert_lora(path, result.path, layout=LAYOUTS[layout], on_tensor=TensorProgress())
        return _done(result, told)

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **rest: Any) -> object:
        """Runs again when the file was written anew."""
        return _stamps(_lora_path, lora)


class K5LoraInfo(io.ComfyNode):
    """What a LoRA file is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5LoraInfo",
            display_name="Kandinsky 5 LoRA Info",
            category=CATEGORY,
            is_output_node=True,
            description="Key format, layers, rank, alpha, trigger words and what the file's maker wrote into it.",
            search_aliases=["lora metadata", "trigger word"],
            inputs=[lora_input()],
            outputs=[
                io.String.Output(display_name="info"),
                io.String.Output(display_name="trigger", tooltip="Words to put into the prompt."),
            ],
        )

    @classmethod
    def execute(cls, lora: str) -> io.NodeOutput:
        told = lora_tools.lora_info(path_of("loras", lora))
        metadata = told.pop("metadata")
        lines = [f"{key}: {_listed(value)}" for key, value in {**told, "file": lora}.items()]
        lines += [f"{key} = {value}" for key, value in metadata.items()]
        return io.NodeOutput("\n".join(lines), told["trigger"], ui=ui.PreviewText("\n".join(lines)))

    @classmethod
    def fingerprint_inputs(cls, lora: str = "") -> object:
        """Looked at again when the file was written anew."""
        return _stamps(_lora_path, lora)


def _listed(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value) or "as the rank"
    return str(value)


def _lora_path(name: str) -> Path:
    return path_of("loras", name)


def _stamps(path_for: Any, choice: Any) -> tuple[Any, ...]:
    """The stamp of a chosen file; nothing for one that another node will name, or that is not there."""
    try:
        return stamp(path_for(choice)) if isinstance(choice, str) and choice else ()
    except ValueError:
        return ()
