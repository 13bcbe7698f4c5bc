"""config.json as the diffusers classes read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import VARIANTS, DiTConfig, NablaConfig, VAEConfig
from .detect import WeightsInfo

_FLUX_SHIFT = 0.1159
"""In every copy of the FLUX VAE's config; Kandinsky 5 does not apply it."""


def diffusers_config(info: WeightsInfo, folder_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields for `Kandinsky5Transformer3DModel`, `AutoencoderKLHunyuanVideo` or `AutoencoderKL`.

    Args:
        info: of a DiT or VAE.
        folder_config: the source's own config.json if it had one: its other keys are kept.
    """
    if isinstance(info.config, DiTConfig):
        nabla = VARIANTS[info.variant].nabla if info.variant else None
        values = _attention_fields(nabla) | _own_keys(folder_config) | _dit_fields(info.config)
    else:
        assert isinstance(info.config, VAEConfig)
        fields = _hunyuan_fields if info.config.kind == "hunyuan" else _flux_fields
        values = _own_keys(folder_config) | fields(info.config)
    return values


def _own_keys(folder_config: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(folder_config or {}) if "_class_name" in (folder_config or {}) else {}


def _dit_fields(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "Kandinsky5Transformer3DModel",
        "in_visual_dim": config.in_visual_dim,
        "out_visual_dim": config.out_visual_dim,
        "in_text_dim": config.in_text_dim,
        "in_text_dim2": config.in_text_dim2,
        "time_dim": config.time_dim,
        "model_dim": config.model_dim,
        "ff_dim": config.ff_dim,
        "num_text_blocks": config.num_text_blocks,
        "num_visual_blocks": config.num_visual_blocks,
        "axes_dims": list(config.axes_dims),
        "patch_size": list(config.patch_size),
        "visual_cond": config.visual_cond,
    }


def _attention_fields(nabla: NablaConfig | None) -> dict[str, Any]:
    if nabla is None:
        return {"attention_type": "regular"}
    frames, height, width = nabla.window
    return {
        "attention_type": "nabla",
        "attention_P": nabla.mass,
        "attention_wT": frames,
        "attention_wH": height,
        "attention_wW": width,
        "attention_add_sta": True,
        "attention_method": "topcdf",
    }


def _hunyuan_fields(config: VAEConfig) -> dict[str, Any]:
    return _vae_fields(config, "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D") | {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "spatial_compression_ratio": config.spatial_ratio,
        "temporal_compression_ratio": config.temporal_ratio,
    }


def _flux_fields(config: VAEConfig) -> dict[str, Any]:
    return _vae_fields(config, "DownEncoderBlock2D", "UpDecoderBlock2D") | {
        "_class_name": "AutoencoderKL",
        "shift_factor": _FLUX_SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }


def _vae_fields(config: VAEConfig, down: str, up: str) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": [down] * levels,
        "up_block_types": [up] * levels,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "act_fn": "silu",
        "mid_block_add_attention": True,
    }
