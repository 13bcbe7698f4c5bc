"""Model sizes from tensor shapes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from ..config import FLUX_VAE, HUNYUAN_VAE, VARIANTS, DiTConfig, VAEConfig
from . import kinds
from .container import WeightsError
from .keys import count_indexed

Shapes = Mapping[str, tuple[int, ...]]
CONFIG_KEY = "kandinsky5.config"
"""Safetensors metadata key with the config as JSON: what shapes cannot tell is read from it."""
_PATCH = (1, 2, 2)
logger = logging.getLogger(__name__)


def axes_dims(head_dim: int) -> tuple[int, int, int]:
    """Head dimensions of the (t, h, w) rotary axes: a quarter and twice three eighths, as in every release.

    Raises:
        WeightsError: head_dim is not a positive multiple of 16, so that these would not be even.
    """
    if head_dim < 16 or head_dim % 16:
        raise WeightsError(f"head_dim {head_dim} is not a multiple of 16; cannot split it over the rotary axes")
    return head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8


def dit_config(shapes: Shapes, hints: Mapping[str, Any] | None = None) -> DiTConfig:
    """Sizes of a DiT; `hints` (config.json or metadata) only choose what shapes leave open: the rotary axes.

    Raises:
        WeightsError: a tensor that the sizes are read from is missing or impossible.
    """
    hints = hints or {}
    dim = _size(shapes, "visual_embeddings.in_layer.bias", 0)
    head_dim = _size(shapes, "visual_transformer_blocks.0.self_attention.query_norm.weight", 0)
    channels = _size(shapes, "visual_embeddings.in_layer.weight", 1) / math.prod(_PATCH)
    out_channels = _size(shapes, "out_layer.out_layer.bias", 0) / math.prod(_PATCH)
    if channels not in (out_channels, 2 * out_channels + 1):
        raise WeightsError(
            f"its patch embedding takes {channels:g} channels for {out_channels:g} that come out; "
            f"expected {out_channels:g}, or {2 * out_channels + 1:g} with source channels and mask"
        )
    try:
        return DiTConfig(
            model_dim=dim,
            ff_dim=_size(shapes, "visual_transformer_blocks.0.feed_forward.in_layer.weight", 0),
            time_dim=_size(shapes, "time_embeddings.in_layer.weight", 0),
            num_text_blocks=count_indexed(shapes, "text_transformer_blocks"),
            num_visual_blocks=count_indexed(shapes, "visual_transformer_blocks"),
            axes_dims=_hinted_axes(hints.get("axes_dims"), head_dim) or axes_dims(head_dim),
            in_visual_dim=int(out_channels),
            out_visual_dim=int(out_channels),
            in_text_dim=_size(shapes, "text_embeddings.in_layer.weight", 1),
            in_text_dim2=_size(shapes, "pooled_text_embeddings.in_layer.weight", 1),
            visual_cond=channels != out_channels,
        )
    except ValueError as error:
        raise WeightsError(f"its sizes fit no DiT: {error}") from error


def vae_config(kind: str, shapes: Shapes, hints: Mapping[str, Any] | None = None) -> VAEConfig:
    """Sizes of a VAE whose tensors carry our names; what shapes leave open comes from `hints` or a released row.

    Raises:
        WeightsError: a tensor that the sizes are read from is missing, or the norm groups cannot be known.
    """
    inner = ".conv" if kind == kinds.HUNYUAN_VAE else ""
    levels = count_indexed(shapes, "encoder.down_blocks")
    sizes = {
        "block_out_channels": tuple(
            _size(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1{inner}.weight", 0) for level in range(levels)
        ),
        "layers_per_block": count_indexed(shapes, "encoder.down_blocks.0.resnets"),
        "latent_channels": _size(shapes, f"decoder.conv_in{inner}.weight", 1),
    }
    released = HUNYUAN_VAE if kind == kinds.HUNYUAN_VAE else FLUX_VAE
    for row in (released, *(row.vae for row in VARIANTS.values() if row.vae.kind == released.kind)):
        if all(getattr(row, name) == value for name, value in sizes.items()):
            return dataclasses.replace(row, **_open_values(hints, kind))
    known = {"temporal_ratio": min(released.temporal_ratio, 2 ** (levels - 1))} | _open_values(hints, kind)
    config = dataclasses.replace(released, **sizes, **known)
    if any(width % config.norm_num_groups for width in config.block_out_channels):
        raise WeightsError(
            f"channels {config.block_out_channels} are not multiples of {config.norm_num_groups} norm groups; "
            f"give norm_num_groups in config.json or metadata {CONFIG_KEY}"
        )
    return config


def hints_from(metadata: Mapping[str, str], folder_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json and the metadata key `CONFIG_KEY` say, the latter first; lists become tuples."""
    told: dict[str, Any] = {}
    if CONFIG_KEY in metadata:
        try:
            told = dict(json.loads(metadata[CONFIG_KEY]))
        except (ValueError, TypeError) as error:
            raise WeightsError(f"metadata {CONFIG_KEY} is not a JSON object ({error})") from error
    values = {**(folder_config or {}), **told}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def report_disagreement(config: DiTConfig | VAEConfig, hints: Mapping[str, Any]) -> None:
    """Warn where a config beside the tensors says otherwise than their shapes, which win."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in hints and hints[field.name] != value:
            logger.warning("config says %s=%s, the tensors say %s; using theirs", field.name, hints[field.name], value)


def _hinted_axes(hinted: Any, head_dim: int) -> tuple[int, int, int] | None:
    usable = isinstance(hinted, tuple) and len(hinted) == 3 and all(isinstance(size, int) for size in hinted)
    return hinted if usable and sum(hinted) == head_dim else None


def _open_values(hints: Mapping[str, Any] | None, kind: str) -> dict[str, Any]:
    hints = hints or {}
    names = {"scaling_factor": ("scaling_factor", float), "norm_num_groups": ("norm_num_groups", int)}
    if kind == kinds.HUNYUAN_VAE:
        # diffusers' word and ours for the same number.
        names |= {name: ("temporal_ratio", int) for name in ("temporal_compression_ratio", "temporal_ratio")}
    values = {}
    for theirs, (ours, kind_of_number) in names.items():
        if theirs in hints:
            value = hints[theirs]
            if not isinstance(value, (int, kind_of_number)) or value <= 0:
                raise WeightsError(f"its config says {theirs}={value!r}; expected a positive {kind_of_number.__name__}")
            values[ours] = value
    return values


def _size(shapes: Shapes, name: str, axis: int) -> int:
    if name not in shapes:
        raise WeightsError(f"tensor '{name}' is missing")
    if len(shapes[name]) <= axis or shapes[name][axis] < 1:
        raise WeightsError(f"tensor '{name}' has shape {shapes[name]}; expected a size at index {axis}")
    return shapes[name][axis]
