"""CLIP: both text encoders behind ComfyUI's CLIP class; its text encode node gives the right template by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...kandinsky5_core.conditioning import TextConditioning
from ...kandinsky5_core.text.encoder import TextEncoder, load_text_encoder
from ...kandinsky5_core.weights.source import open_source

MAX_TOKENS = {"video": 256, "image": 512}
"""Qwen tokens kept after the template, as the released models were trained."""
TASKS = {"video": "t2v", "image": "t2i"}


class TextModels(nn.Module):
    """The two networks as one module, for ComfyUI's memory management."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.qwen, self.clip = encoder.qwen, encoder.clip
        self.dtypes = {next(encoder.qwen.parameters()).dtype}

    def reset_clip_options(self) -> None:
        """Nothing to reset: no layer is ever skipped."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Kandinsky 5 was trained on the last layer: other layers are not offered."""


class K5CLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP around a core `TextEncoder`.

    Tokens are made where they are encoded, so what travels between nodes is the text itself.
    """

    def __init__(self, encoder: TextEncoder, kind: str) -> None:
        super().__init__(no_init=True)
        self.encoder, self.kind = encoder, kind
        self.cond_stage_model = TextModels(encoder)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.cond_stage_model,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.patcher.is_clip = True
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None
        self.tokenizer = None
        self.tokenizer_options: dict[str, Any] = {}

    def clone(self, disable_dynamic: bool = False) -> K5CLIP:
        """Another view of the same encoders, with patches of its own."""
        made = K5CLIP(self.encoder, self.kind)
        made.patcher = self.patcher.clone()
        made.cond_stage_model = self.cond_stage_model
        made.layer_idx = self.layer_idx
        made.tokenizer_options = self.tokenizer_options.copy()
        made.use_clip_schedule, made.apply_hooks_to_conds = self.use_clip_schedule, self.apply_hooks_to_conds
        return made

    def tokenize(
        self,
        text: str,
        return_word_ids: bool = False,
        *,
        images: Sequence[Tensor] = (),
        task: str | None = None,
        edit_template: str = "snapshot",
        **_: Any,
    ) -> dict[str, Any]:
        """What `encode_from_tokens` takes; images (H, W, 3) belong to an edit."""
        task = task or TASKS[self.kind]
        given = {"text": text, "task": task, "images": list(images), "edit_template": edit_template}
        return {"k5": given, "qwen25_7b": text}

    def encode_from_tokens(
        self, tokens: dict[str, Any], return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """Embeddings (1, L, D), trimmed to the tokens there are, and the pooled vector (1, P)."""
        found = self.conditioning(**tokens["k5"])
        if tokens["qwen25_7b"] != tokens["k5"]["text"]:
            # ComfyUI's two-prompt node: the first text is CLIP's, the second Qwen's.
            spoken = self.conditioning(**{**tokens["k5"], "text": tokens["qwen25_7b"]})
            found = replace(spoken, pooled=found.pooled)
        values = {"cond": found.embeds, "pooled_output": found.pooled}
        if return_dict:
            self.add_hooks_to_dict(values)
            return values
        return (found.embeds, found.pooled) if return_pooled else found.embeds

    def conditioning(self, *, text: str, task: str, images: list[Tensor], edit_template: str) -> TextConditioning:
        """Encoded text on ComfyUI's intermediate device, fp32."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        encoded = self.encoder.encode(
            [text],
            task=task,
            max_tokens=MAX_TOKENS[self.kind],
            images=[images] if images else None,
            edit_template=edit_template,
        )
        return encoded.trimmed().to(comfy.model_management.intermediate_device(), torch.float32)

    def load_model(self, tokens: dict[str, Any] | None = None) -> Any:
        """Both encoders onto their device, whole."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher

    def state_dict_for_saving(self) -> dict[str, Tensor]:
        """Text encoders are not part of a checkpoint here.

        Raises:
            ValueError: always; says what to do.
        """
        raise ValueError(
            "Kandinsky 5's text encoders are not saved into checkpoints; keep their files, and save the model"
        )

    def get_sd(self) -> dict[str, Tensor]:
        """Weights, for checkpoints that hold text encoders too."""
        return self.cond_stage_model.state_dict()


def load_clip(qwen: Path, clip: Path, kind: str, *, bundled: bool = False) -> K5CLIP:
    """Both encoders from files or folders.

    Args:
        kind: 'video' or 'image': which template stock text encode nodes get.
        bundled: The tokenizers lie beside the weights; otherwise ComfyUI's own copies are used.
    """
    encoder = load_text_encoder(
        qwen,
        clip,
        # Not folder_paths.base_path, which --base-directory moves to the user's folder.
        comfyui=None if bundled else Path(comfy.sd.__file__).parents[1],
        lm_head=has_head(qwen),
        local_files_only=True,
        dtype=torch.float32 if bundled else released_dtype(),
    )
    return K5CLIP(encoder, kind)


def released_dtype() -> torch.dtype:
    """Of the 7B Qwen in memory: bf16, its own, wherever that computes; fp16 overflows in its last layers."""
    device = comfy.model_management.text_encoder_device()
    if comfy.model_management.is_device_cpu(device) or comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return comfy.model_management.text_encoder_dtype(device)


def has_head(qwen: Path) -> bool:
    """Whether the file can also write text, for the prompt enhancer."""
    return any(name.endswith("lm_head.weight") for name in open_source(qwen).tensors)
