"""LoRAs: a stack of files in any key format."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .bridge.lora import NONE, apply_lora, lora_choices

CATEGORY = "Kandinsky 5/load"
SLOTS = 3


class K5LoadLora(io.ComfyNode):
    """Up to three LoRAs on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        slots: list[io.Input] = []
        for number in range(1, SLOTS + 1):
            slots += [
                io.Combo.Input(
                    f"lora_{number}",
                    options=[NONE, *lora_choices()],
                    default=NONE,
                    tooltip="A file of models/loras with official, diffusers, ComfyUI or kohya keys.",
                    advanced=number > 1,
                ),
                io.Float.Input(
                    f"strength_{number}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 as trained; 0 off; negative turns it round.",
                    advanced=number > 1,
                ),
            ]
        return io.Schema(
            node_id="K5LoadLora",
            display_name="Load Kandinsky 5 LoRA",
            category=CATEGORY,
            is_output_node=False,
            description="Applies LoRAs of any key format and shows their trigger words. A file none of whose keys fits "
            "is an error; keys that are left over are counted.",
            search_aliases=["lora loader", "lora stack"],
            inputs=[io.Model.Input("model", tooltip="A Kandinsky 5 MODEL."), *slots],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="trigger", tooltip="Words to put into the prompt."),
                io.String.Output(display_name="report", tooltip="What was applied."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, **slots: Any) -> io.NodeOutput:
        triggers, report = [], []
        for number in range(1, SLOTS + 1):
            name, strength = slots.get(f"lora_{number}", NONE), slots.get(f"strength_{number}", 1.0)
            if name == NONE or strength == 0:
                continue
            model, told = apply_lora(model, name, strength)
            report.append(told.line)
            triggers += [told.trigger] if told.trigger else []
        text = "\n".join(report) or "no LoRA chosen"
        return io.NodeOutput(model, ", ".join(triggers), text, ui=ui.PreviewText(text))
