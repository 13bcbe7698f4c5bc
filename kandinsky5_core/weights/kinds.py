"""What a set of tensor names belongs to, by the names alone."""

from __future__ import annotations

import re
from collections.abc import Collection

DIT, HUNYUAN_VAE, FLUX_VAE, QWEN, CLIP, LORA, UNKNOWN = (
    "dit", "hunyuan_vae", "flux_vae", "qwen", "clip", "lora", "unknown",
)  # fmt: skip
VAE_KINDS = (HUNYUAN_VAE, FLUX_VAE)
WORDS = {
    DIT: "a Kandinsky 5 DiT",
    HUNYUAN_VAE: "a HunyuanVideo VAE",
    FLUX_VAE: "a FLUX VAE",
    QWEN: "a Qwen2.5-VL text encoder",
    CLIP: "a CLIP text encoder",
    LORA: "a LoRA",
    UNKNOWN: "none of the known models",
}
"""Kind -> how messages call it."""

_LORA = re.compile(r"\.lora_(A|B|down|up)\.|\.lora\.(down|up)\.|^lycoris_|^lora_unet_|\.(lokr|loha|hada)_")
_QUANTISED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant)$")
# Names that only one foreign model has; searched anywhere, so a prefix does not hide them.
_FOREIGN = (
    ("a Kandinsky 6 transformer", r"timestep_embedder\.|audio_dec_block|visual_token_type"),
    ("a Wan video transformer", r"(^|\.)text_embedding\.0\.weight|condition_embedder\.text_embedder"),
    ("a HunyuanVideo transformer", r"individual_token_refiner|img_attn_qkv|context_embedder\.token_refiner"),
    ("a FLUX transformer", r"double_blocks\.0\.img_attn\.qkv|single_transformer_blocks\.0\.proj_mlp"),
    ("a Stable Diffusion 3 transformer", r"joint_blocks\.0\.|transformer_blocks\.0\.attn\.add_k_proj"),
    ("an SDXL checkpoint", r"(^|\.)label_emb\.0\.|add_embedding\.linear_1"),
    ("a Stable Diffusion UNet", r"input_blocks\.0\.0\.weight|down_blocks\.0\.attentions\.0\.transformer_blocks"),
    ("a CogVideoX transformer", r"patch_embed\.text_proj"),
    ("an LTX-Video transformer", r"(^|\.)adaln_single\.|caption_projection\.linear_1"),
    ("a Qwen-Image transformer", r"img_mod\.1\.weight"),
    ("a Wan VAE", r"decoder\.middle\.0\.residual\.|decoder\.mid_block\.resnets\.0\.norm1\.gamma"),
    ("a T5 text encoder", r"block\.0\.layer\.0\.SelfAttention\.q\.weight"),
)


def kind_of(names: Collection[str]) -> str:
    """Kind of the tensors called `names` (prefixes of `keys.PREFIXES` taken off); 'unknown' if none fits."""
    if any(_LORA.search(name) for name in names):
        return LORA
    if any(name.startswith(("visual_transformer_blocks.", "visual_embeddings.in_layer.")) for name in names):
        return UNKNOWN if _is_foreign(names, "a Kandinsky 6 transformer") else DIT
    if any(name.startswith("decoder.") for name in names):
        if "decoder.conv_in.conv.weight" in names:
            return HUNYUAN_VAE
        if "decoder.conv_in.weight" in names and "quant_conv.weight" not in names:
            return FLUX_VAE
    if any(name.endswith("text_model.encoder.layers.0.self_attn.q_proj.weight") for name in names):
        return CLIP
    if any(name.endswith("layers.0.self_attn.q_proj.bias") for name in names):
        # Of the decoders in use with image models only Qwen has a bias on its query projection.
        return QWEN
    return UNKNOWN


def _is_foreign(names: Collection[str], words: str) -> bool:
    return any(re.search(dict(_FOREIGN)[words], name) for name in names)


def looks_like(names: Collection[str]) -> str:
    """In words, what the tensors belong to, foreign models included."""
    kind = kind_of(names)
    if kind != UNKNOWN:
        return WORDS[kind]
    for words, pattern in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return words
    if "decoder.conv_in.weight" in names and "quant_conv.weight" in names:
        return "a Stable Diffusion VAE (it has quant_conv, the FLUX VAE has none)"
    first = ", ".join(sorted(names)[:3])
    return f"{WORDS[UNKNOWN]} (tensors such as {first})" if names else "a file without tensors"


def is_quantised(names: Collection[str]) -> bool:
    """Whether scale tensors of a quantised file are among the names."""
    return any(_QUANTISED.search(name) for name in names)
