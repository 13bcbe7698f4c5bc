"""The CLIP text tower: from a folder or a single file, always in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..weights.container import TensorRecord, WeightsError
from ..weights.modules import build_on_meta
from ..weights.scaled_fp8 import split_scales
from ..weights.source import open_source
from .loading import count_layers, fill_transformer, find_prefix, looks_like, shape_of, under

if TYPE_CHECKING:
    from transformers import CLIPTextModel

HEAD_DIM = 64
ANCHOR = "embeddings.token_embedding.weight"
_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")


def load_clip(path: Path | str, *, eos_token_id: int, device: torch.device | str = "cpu") -> CLIPTextModel:
    """A CLIP text model from an HF folder or a single file (`clip_l.safetensors`, any prefix); fp32.

    Args:
        eos_token_id: the tokenizer's; the pooled vector is taken at its first place in each row, whatever the
            config says (old configs say 2, which no tokenizer writes).

    Raises:
        WeightsError: the file is not a CLIP text tower.
    """
    from transformers import CLIPTextModel

    source = open_source(path)
    try:
        weights = _text_tower(source.tensors)
        config = _config(source.folder_config, split_scales(weights)[0])
        config.eos_token_id = eos_token_id
        model = build_on_meta(lambda: CLIPTextModel(config))
        # transformers 4 keeps the tower under `text_model.`, 5 does not.
        prefix = find_prefix(model.state_dict(), ANCHOR) or ""
        return fill_transformer(model, under(weights, "", prefix), dtype=torch.float32, device=device)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _text_tower(tensors: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    prefix = find_prefix(tensors, ANCHOR)
    if prefix is None:
        raise WeightsError(f"looks like {looks_like(tensors)}; expected a CLIP text encoder ({ANCHOR})")
    # A whole CLIP also has a vision tower and projections, which nothing here reads.
    return {name: record for name, record in under(tensors, prefix).items() if name.startswith(_PARTS)}


def _config(folder_config: Mapping[str, Any] | None, weights: Mapping[str, TensorRecord]) -> Any:
    from transformers import CLIPTextConfig

    if folder_config is not None:
        found = folder_config.get("model_type", "nothing")
        if found not in ("clip", "clip_text_model"):
            raise WeightsError(f"its config.json is for model_type '{found}'; expected 'clip' or 'clip_text_model'")
        return CLIPTextConfig.from_dict(folder_config.get("text_config") or folder_config)
    rows, width = shape_of(weights, ANCHOR)
    if width % HEAD_DIM:
        raise WeightsError(f"a width of {width} is not a multiple of {HEAD_DIM}, as in CLIP text encoders")
    return CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=shape_of(weights, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count_layers(weights, "encoder.layers."),
        num_attention_heads=width // HEAD_DIM,
        max_position_embeddings=shape_of(weights, "embeddings.position_embedding.weight")[0],
        # The L towers use the quick form, wider ones (1024, 1280) the exact one.
        hidden_act="quick_gelu" if width <= 768 else "gelu",
    )
