"""CLIP: both text encoders behind ComfyUI's CLIP class; its text encode node gives the right template by itself.

ComfyUI's memory management decides how much of them is on the card; what waits is brought in layer by layer.
"""

from __future__ import annotations

import logging
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
from ...kandinsky5_core.memory.quantized_text import text_quantiser
from ...kandinsky5_core.text.encoder import TextEncoder, load_text_encoder
from ...kandinsky5_core.text.loading import KeepStored, Quantise
from ...kandinsky5_core.weights.container import DTYPES
from ...kandinsky5_core.weights.scaled_fp8 import SCALED
from ...kandinsky5_core.weights.source import open_source
from .layers import PartlyCastable, make_castable
from .quantised import check_format, kept_or_again, knows, quantise, quantised_layer, quantised_ops

log = logging.getLogger(__name__)

MAX_TOKENS = {"video": 256, "image": 512}
"""Qwen tokens kept after the template, as the released models were trained."""
TASKS = {"video": "t2v", "image": "t2i"}
DEFAULT, NF4 = "default", "nf4"
TEXT_WEIGHTS = (DEFAULT, "bf16", "fp8", "int8", NF4)
"""How Qwen's linear layers are kept: as the file has them, in 16 bits, in eight, in four."""


class TextModels(nn.Module):
    """The two networks as one module, for ComfyUI's memory management."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.qwen, self.clip = encoder.qwen, encoder.clip
        self.manual_cast_dtype = encoder.qwen.dtype
        self.dtypes = {self.manual_cast_dtype}
        make_castable(self)
        _let_tell_device(self.qwen)

    def compute_on(self, device: torch.device) -> None:
        """Where ids and pictures go from now on; weights may lie elsewhere."""
        self.qwen.computes_on = device

    def reset_clip_options(self) -> None:
        """Nothing to reset: no layer is ever skipped."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Kandinsky 5 was trained on the last layer: other layers are not offered."""


class K5CLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP around a core `TextEncoder`.

    Tokens are made where they are encoded, so what travels between nodes is the text itself.
    """

    def __init__(self, encoder: TextEncoder, kind: str, *, whole: bool = False) -> None:
        """
        Args:
            whole: Some layers are of classes that ComfyUI cannot bring in one by one (bitsandbytes).
        """
        super().__init__(no_init=True)
        self.encoder, self.kind, self.whole = encoder, kind, whole
        self.cond_stage_model = TextModels(encoder)
        patcher = comfy.model_patcher.ModelPatcher if whole else PartlyCastable
        self.patcher = patcher(
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
        made = K5CLIP(self.encoder, self.kind, whole=self.whole)
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
        self.load_model()
        encoded = self.encoder.encode(
            [text],
            task=task,
            max_tokens=MAX_TOKENS[self.kind],
            images=[images] if images else None,
            edit_template=edit_template,
        )
        return encoded.trimmed().to(comfy.model_management.intermediate_device(), torch.float32)

    def load_model(self, tokens: dict[str, Any] | None = None) -> Any:
        """Both encoders onto their device, as much of them as there is room for."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=self.whole)
        self.cond_stage_model.compute_on(self.patcher.load_device)
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


def _let_tell_device(qwen: nn.Module) -> None:
    # transformers asks the first weights where to compute, and those may wait in CPU memory.
    if not hasattr(qwen, "computes_on"):
        qwen.computes_on = qwen.device
        kind = type(qwen)
        qwen.__class__ = type(kind.__name__, (kind,), {"device": property(lambda model: model.computes_on)})


def load_clip(
    qwen: Path, clip: Path, kind: str, *, bundled: bool = False, text_weights: str = DEFAULT
) -> K5CLIP:
    """Both encoders from files or folders.

    Args:
        kind: 'video' or 'image': which template stock text encode nodes get.
        bundled: The tokenizers lie beside the weights; otherwise ComfyUI's own copies are used.
        text_weights: One of `TEXT_WEIGHTS`.

    Raises:
        ValueError: a file does not fit, or what `text_weights` needs is not installed.
    """
    dtype = torch.float32 if bundled and text_weights != "bf16" else released_dtype()
    change, keep = text_layers(text_weights, dtype, stored_as(qwen))
    encoder = load_text_encoder(
        qwen,
        clip,
        # Not folder_paths.base_path, which --base-directory moves to the user's folder.
        comfyui=None if bundled else Path(comfy.sd.__file__).parents[1],
        lm_head=has_head(qwen),
        local_files_only=True,
        dtype=dtype,
        quantise=change,
        keep_stored=keep,
    )
    return K5CLIP(encoder, kind, whole=text_weights == NF4)


def text_layers(
    text_weights: str, dtype: torch.dtype, in_file: torch.dtype | None
) -> tuple[Quantise | None, KeepStored | None]:
    """What Qwen's linear layers become as they are read: those of the language model, and those that are in eight bits
    in the file.

    Args:
        in_file: The eight-bit dtype of the language model's layers in the file, if they have one.

    Raises:
        ValueError: unknown word, or what it needs is not installed.
    """
    if text_weights not in TEXT_WEIGHTS:
        raise ValueError(f"text_weights '{text_weights}' is unknown; use one of {', '.join(TEXT_WEIGHTS)}")
    if text_weights == "bf16" or (text_weights == DEFAULT and in_file is None):
        return None, None
    if text_weights == NF4:
        return text_quantiser(NF4), None
    stored = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(text_weights, in_file)
    if text_weights == DEFAULT and not knows(stored):
        log.warning("Kandinsky 5: this ComfyUI has no layers for %s; the text encoder is kept in %s", stored, dtype)
        return None, None
    check_format(stored)
    ops = quantised_ops(stored, dtype)

    def keep(layer: nn.Linear, weight: Tensor, scale: Tensor | None) -> nn.Module:
        return quantised_layer(ops, layer, *kept_or_again(weight, scale))

    def change(layer: nn.Linear) -> nn.Module:
        return quantised_layer(ops, layer, *quantise(layer.weight, stored))

    return None if stored == in_file else change, keep


def stored_as(qwen: Path) -> torch.dtype | None:
    """The eight-bit dtype that the language model's layers have in the file; None where they have another."""
    # Some files name them without anything before 'layers'.
    records = [record for name, record in open_source(qwen).tensors.items() if ".layers." in f".{name}"]
    return next((DTYPES[record.dtype][1] for record in records if record.dtype in SCALED), None)


def released_dtype() -> torch.dtype:
    """Of the 7B Qwen in memory: bf16, its own, wherever that computes; fp16 overflows in its last layers."""
    device = comfy.model_management.text_encoder_device()
    if comfy.model_management.is_device_cpu(device) or comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return comfy.model_management.text_encoder_dtype(device)


def has_head(qwen: Path) -> bool:
    """Whether the file can also write text, for the prompt enhancer."""
    return any(name.endswith("lm_head.weight") for name in open_source(qwen).tensors)
