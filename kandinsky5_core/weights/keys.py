"""Names of tensors in the layouts that exist, and their translation: pure functions of names and shapes.

Our modules carry the names of the official DiT files and of the diffusers VAE files. Other layouts: a prefix before
every name (ComfyUI), and the single-file VAE names of BFL, Tencent's ComfyUI repackage and their kin, where the
decoder's levels are counted from the pixels instead of from the latents and attention weights are 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "first_stage_model.",
    "vae.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
)
"""Prefixes of the parts of ComfyUI files and full checkpoints."""

_ATTENTION = "mid_block.attentions.0"
# ours -> single file; {i} a level, {r} the same level counted from the other end, {j} a block
_RULES = (
    ("down_blocks.{i}.resnets.{j}", "down.{i}.block.{j}"),
    ("down_blocks.{i}.downsamplers.0", "down.{i}.downsample"),
    ("up_blocks.{i}.resnets.{j}", "up.{r}.block.{j}"),
    ("up_blocks.{i}.upsamplers.0", "up.{r}.upsample"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    (f"{_ATTENTION}.group_norm", "mid.attn_1.norm"),
    (f"{_ATTENTION}.to_q", "mid.attn_1.q"),
    (f"{_ATTENTION}.to_k", "mid.attn_1.k"),
    (f"{_ATTENTION}.to_v", "mid.attn_1.v"),
    (f"{_ATTENTION}.to_out.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def split_prefixes(names: Iterable[str]) -> dict[str, list[str]]:
    """Prefix -> names without it, for the known `PREFIXES` and '' (no known prefix)."""
    parts: dict[str, list[str]] = {}
    for name in names:
        prefix = next((known for known in PREFIXES if name.startswith(known)), "")
        parts.setdefault(prefix, []).append(name[len(prefix) :])
    return parts


def count_indexed(names: Iterable[str], stem: str) -> int:
    """How many different `stem.0`, `stem.1`, ... there are (never more than names, whatever a file claims)."""
    pattern = re.compile(re.escape(stem) + r"\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def vae_to_single(name: str, levels: int) -> str:
    """Our (diffusers) VAE name -> its name in the BFL / ComfyUI single file."""
    return _translate(name, levels, to_single=True)


def vae_from_single(name: str, levels: int) -> str:
    """Name in a BFL / ComfyUI single-file VAE -> ours (diffusers)."""
    return _translate(name, levels, to_single=False)


def _translate(name: str, levels: int, *, to_single: bool) -> str:
    for ours, single in _RULES:
        source, target = (ours, single) if to_single else (single, ours)
        pattern = re.escape(source).replace(r"\{", "{").replace(r"\}", "}")
        for letter in "irj":
            pattern = pattern.replace(f"{{{letter}}}", rf"(?P<{letter}>\d+)")
        name = re.sub(rf"(?<![^.]){pattern}(?=\.)", lambda match, target=target: _fill(target, match, levels), name)
    return name


def _fill(template: str, match: re.Match[str], levels: int) -> str:
    found = {key: int(value) for key, value in match.groupdict().items()}
    level = found["i"] if "i" in found else levels - 1 - found.get("r", 0)
    return template.format(i=level, r=levels - 1 - level, j=found.get("j"))


def is_attention_weight(name: str) -> bool:
    """Whether our VAE name is an attention projection: a matrix for us, a 1x1 convolution in single files."""
    return ".attentions." in name and name.endswith(".weight") and "group_norm" not in name


def attention_as_matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, C, 1, 1[, 1]) -> (C, C) for attention projections; every other shape as it is."""
    ones = shape[2:] and all(size == 1 for size in shape[2:])
    return shape[:2] if ones and is_attention_weight(name) else shape


def attention_as_convolution(name: str, shape: tuple[int, ...], spatial_dims: int) -> tuple[int, ...]:
    """(C, C) -> (C, C, 1, 1) or, for 3 `spatial_dims`, (C, C, 1, 1, 1), for attention projections."""
    return shape + (1,) * spatial_dims if len(shape) == 2 and is_attention_weight(name) else shape
