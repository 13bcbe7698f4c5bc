"""Qwen2.5-VL: from a folder or a single file, with or without its vision tower and language-model head.

The model keeps its transformers class, so its names are `model.language_model.*`, `model.visual.*` and
`lm_head.weight`; files use these, or the older `model.*` and `visual.*`, and prefixes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..weights.container import TensorRecord, WeightsError
from ..weights.modules import build_on_meta
from ..weights.scaled_fp8 import split_scales
from ..weights.source import open_source
from .loading import KeepStored, Quantise, count_layers, fill_transformer, find_prefix, looks_like, shape_of, under

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TEXT, VISUAL, HEAD = "model.language_model.", "model.visual.", "lm_head.weight"
TEXT_ANCHOR, VISUAL_ANCHOR = "embed_tokens.weight", "patch_embed.proj.weight"
HEAD_DIM = 128
MROPE_SECTION = (16, 24, 24)
VISION_HEAD_DIM = 80
FULL_ATTENTION_EVERY = 8
"""In the vision tower every eighth block sees the whole image, the others windows of 112 pixels."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What of a Qwen2.5-VL a file holds, by the names of the transformers class."""

    text: dict[str, TensorRecord]
    visual: dict[str, TensorRecord]
    head: dict[str, TensorRecord]

    @property
    def weights(self) -> dict[str, TensorRecord]:
        """Without scales."""
        return split_scales({**self.text, **self.visual, **self.head})[0]


def load_qwen(
    path: Path | str,
    *,
    lm_head: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantise: Quantise | None = None,
    keep_stored: KeepStored | None = None,
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL from an HF folder (sharded or not) or a single file (fp8-scaled ones too).

    Args:
        lm_head: also load the head that writes text, for the prompt enhancer. Without it `lm_head` is None.
        dtype: of the weights in memory; None keeps the file's (bfloat16 for fp8).
        quantise: what to put in the place of each linear layer of the language model as it is read.
        keep_stored: what to put in the place of linear layers that are fp8 or int8 in the file; None widens them to
            `dtype`.

    A file without a vision tower gives a model whose `model.visual` is None.

    Raises:
        WeightsError: the file is not a Qwen2.5-VL, or has no head where one is wanted.
    """
    source = open_source(path)
    try:
        parts = _parts(source.tensors)
        config = _config(source.folder_config, parts)
        return _fill(
            config, parts, lm_head=lm_head, device=device, dtype=dtype, quantise=quantise, keep_stored=keep_stored
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _parts(tensors: Mapping[str, TensorRecord]) -> _Parts:
    text, visual = find_prefix(tensors, TEXT_ANCHOR), find_prefix(tensors, VISUAL_ANCHOR)
    head = find_prefix(tensors, HEAD)
    if text is None:
        raise WeightsError(f"looks like {looks_like(tensors)}; expected a Qwen2.5-VL ({TEXT_ANCHOR})")
    vision_parts = under(tensors, visual, VISUAL) if visual is not None else {}
    head_prefix = None if head is None else head + "lm_head."
    head_parts = under(tensors, head_prefix, "lm_head.") if head_prefix is not None else {}
    # The text prefix `model.` of some files is also the start of `model.visual.`.
    others = tuple(prefix for prefix in (visual, head_prefix) if prefix)
    language = {name: record for name, record in tensors.items() if not name.startswith(others)}
    return _Parts(text=under(language, text, TEXT), visual=vision_parts, head=head_parts)


def _fill(
    config: Qwen2_5_VLConfig,
    parts: _Parts,
    *,
    lm_head: bool,
    device: torch.device | str,
    dtype: torch.dtype | None,
    quantise: Quantise | None,
    keep_stored: KeepStored | None,
) -> Qwen2_5_VLForConditionalGeneration:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tied = bool(config.tie_word_embeddings) and not parts.head
    if lm_head and not parts.head and not tied:
        raise WeightsError(f"has no {HEAD}, which the prompt enhancer needs; use a file that has it")
    model = build_on_meta(lambda: Qwen2_5_VLForConditionalGeneration(config))
    if not lm_head or tied:
        model.lm_head = None
    if not parts.visual:
        model.model.visual = None
    head = parts.head if lm_head else {}
    records = {**parts.text, **parts.visual, **head}
    fill_transformer(model, records, dtype=dtype, device=device, quantise=quantise, keep_stored=keep_stored)
    if lm_head and tied:
        model.lm_head = _tied_head(model)
    return model


def _tied_head(model: Qwen2_5_VLForConditionalGeneration) -> torch.nn.Linear:
    embeddings = model.model.language_model.embed_tokens.weight
    rows, width = embeddings.shape
    head = torch.nn.Linear(width, rows, bias=False, device="meta")
    head.weight = embeddings
    return head


def _config(folder_config: Mapping[str, Any] | None, parts: _Parts) -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    if folder_config is None:
        config = Qwen2_5_VLConfig(
            text_config=_text_sizes(parts.weights), vision_config=_vision_sizes(parts.weights, bool(parts.visual)),
            tie_word_embeddings=False,
        )  # fmt: skip
    else:
        if folder_config.get("model_type") != "qwen2_5_vl":
            found = folder_config.get("model_type", "nothing")
            raise WeightsError(f"its config.json is for model_type '{found}'; expected 'qwen2_5_vl'")
        config = Qwen2_5_VLConfig.from_dict(dict(folder_config))
        if not parts.visual:
            config.vision_config.depth = 0
    return config


def _text_sizes(weights: Mapping[str, TensorRecord]) -> dict[str, Any]:
    rows, width = shape_of(weights, TEXT + TEXT_ANCHOR)
    query, key = (shape_of(weights, f"{TEXT}layers.0.self_attn.{name}_proj.weight")[0] for name in "qk")
    if query % HEAD_DIM or key % HEAD_DIM:
        raise WeightsError(f"query and key widths {query}, {key} are not multiples of {HEAD_DIM}, as in Qwen2.5-VL")
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": shape_of(weights, f"{TEXT}layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": count_layers(weights, TEXT + "layers."),
        "num_attention_heads": query // HEAD_DIM,
        "num_key_value_heads": key // HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(MROPE_SECTION)},
        "max_position_embeddings": 128_000,
    }


def _vision_sizes(weights: Mapping[str, TensorRecord], present: bool) -> dict[str, Any]:
    if not present:
        return {"depth": 0}
    width, channels, frames, patch, _ = shape_of(weights, VISUAL + VISUAL_ANCHOR)
    depth = count_layers(weights, VISUAL + "blocks.")
    merged = shape_of(weights, VISUAL + "merger.mlp.0.weight")[1]
    if width % VISION_HEAD_DIM:
        raise WeightsError(f"a vision width of {width} is not a multiple of {VISION_HEAD_DIM}, as in Qwen2.5-VL")
    return {
        "depth": depth,
        "hidden_size": width,
        "num_heads": width // VISION_HEAD_DIM,
        "intermediate_size": shape_of(weights, VISUAL + "blocks.0.mlp.gate_proj.weight")[0],
        "out_hidden_size": shape_of(weights, VISUAL + "merger.mlp.2.weight")[0],
        "in_channels": channels,
        "temporal_patch_size": frames,
        "patch_size": patch,
        "spatial_merge_size": round((merged / width) ** 0.5),
        "window_size": 112,
        "fullatt_block_indexes": list(range(FULL_ATTENTION_EVERY - 1, depth, FULL_ATTENTION_EVERY)),
        "tokens_per_second": 2,
    }
