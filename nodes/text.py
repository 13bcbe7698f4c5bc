"""Prompts to CONDITIONING, and the prompt enhancer."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..kandinsky5_core.config import VIDEO_NEGATIVE_PROMPT
from ..kandinsky5_core.text.templates import EDIT_TEMPLATES
from .bridge.clip import K5CLIP
from .bridge.progress import OUT_OF_MEMORY, TokenProgress

log = logging.getLogger(__name__)

CATEGORY = "Kandinsky 5/text"
TASKS = ("auto", "t2v", "i2v", "t2i", "i2i")


def check_clip(clip: Any) -> K5CLIP:
    """The CLIP, if it is one of ours.

    Raises:
        ValueError: it was loaded by another node.
    """
    if not isinstance(clip, K5CLIP):
        raise ValueError(
            "clip was not loaded by 'Load Kandinsky 5 Text Encoders'; use that node, or ComfyUI's text encode"
        )
    return clip


class K5EncodePrompts(io.ComfyNode):
    """Positive and negative prompt with the right template."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5EncodePrompts",
            display_name="Kandinsky 5 Prompts",
            category=CATEGORY,
            description="Encodes the prompt and what should not be seen, with the template of the task.",
            search_aliases=["clip text encode", "prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="From a Kandinsky 5 loader."),
                io.String.Input("positive", multiline=True, dynamic_prompts=True, tooltip="What should be seen."),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What should not be seen. Empty is right for images; the video models were "
                    f"shown with: {VIDEO_NEGATIVE_PROMPT}",
                ),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Whose template: auto takes it from the loader, and i2i where images are given.",
                ),
                io.Combo.Input(
                    "edit_template",
                    options=list(EDIT_TEMPLATES),
                    default="snapshot",
                    optional=True,
                    advanced=True,
                    tooltip="Text around an edit instruction. Which one the weights saw is not published.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures to edit; Qwen reads them with the instruction."
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        positive: str,
        negative: str = "",
        task: str = "auto",
        edit_template: str = "snapshot",
        images: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(*encode_pair(clip, positive, negative, task, edit_template, images))


def encode_pair(
    clip: Any, positive: str, negative: str, task: str = "auto", edit_template: str = "snapshot", images: Any = None
) -> tuple[Any, Any]:
    """Positive and negative CONDITIONING; images (B, H, W, 3) belong to both."""
    check_clip(clip)
    if not positive.strip():
        raise ValueError("positive is empty; say what should be seen")
    shown = [] if images is None else [image[..., :3] for image in images]
    task = "i2i" if task == "auto" and shown else task
    extra = {"images": shown, "edit_template": edit_template, "task": None if task == "auto" else task}
    return tuple(clip.encode_from_tokens_scheduled(clip.tokenize(text, **extra)) for text in (positive, negative))


class K5EnhancePrompt(io.ComfyNode):
    """Let Qwen write the prompt out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5EnhancePrompt",
            display_name="Kandinsky 5 Enhance Prompt",
            category=CATEGORY,
            is_output_node=True,
            description="Writes a short prompt out with Qwen, in the manner the models were trained on, and shows it. "
            "Type into 'edited' to use your own version instead; nothing is generated then.",
            search_aliases=["expand prompt", "beautify"],
            inputs=[
                io.Clip.Input("clip", tooltip="From a Kandinsky 5 loader; the file must hold Qwen's head."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="The short prompt."),
                io.Combo.Input(
                    "task",
                    options=["t2v", "i2v", "t2i", "i2i"],
                    default="t2v",
                    tooltip="What the prompt is for; i2v and i2i look at the image too.",
                ),
                io.Boolean.Input("enabled", default=True, tooltip="Off: the prompt goes through unchanged."),
                io.String.Input(
                    "edited",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Copy the shown text here and change it; while this is not empty it is used.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Another seed writes another text.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="0 always takes the likeliest word.",
                ),
                io.Int.Input(
                    "max_tokens", default=512, min=16, max=2048, optional=True, advanced=True, tooltip="Longest answer."
                ),
                io.Image.Input("image", optional=True, tooltip="For i2v and i2i."),
            ],
            outputs=[io.String.Output(display_name="prompt")],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompt: str,
        task: str,
        enabled: bool,
        seed: int,
        edited: str = "",
        temperature: float = 0.7,
        max_tokens: int = 512,
        image: Any = None,
    ) -> io.NodeOutput:
        text, note = edited.strip(), ""
        if not text:
            text = prompt
            if enabled:
                text, note = written_out(check_clip(clip), prompt, task, seed, temperature, max_tokens, image)
        return io.NodeOutput(text, ui=ui.PreviewText(text + note))


def written_out(
    clip: K5CLIP, prompt: str, task: str, seed: int, temperature: float, max_tokens: int, image: Any
) -> tuple[str, str]:
    """The enhanced prompt and ''; where the enhancer cannot run the prompt itself and why: it never blocks a run."""
    from ..kandinsky5_core.text.enhancer import enhance

    picture = image[0, ..., :3] if image is not None and task in ("i2v", "i2i") else None
    clip.load_model()
    try:
        text = enhance(
            clip.encoder,
            prompt,
            task=task,
            image=picture,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_tokens,
            on_token=TokenProgress(max_tokens),
        )
    except OUT_OF_MEMORY:
        raise  # ComfyUI frees memory and says so
    except (ValueError, RuntimeError) as error:
        log.warning("Kandinsky 5: the prompt stays as it is, the enhancer cannot run: %s", error)
        return prompt, f"\n\n(unchanged, the enhancer cannot run: {error})"
    return text, ""
