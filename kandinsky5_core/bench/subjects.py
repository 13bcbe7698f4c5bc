"""Models to measure: random weights at full width, where the released ones are not at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import TextConditioning
from ..config import DiTConfig, VAEConfig
from ..dit.model import DiffusionTransformer
from ..vae.flux import FluxVAE
from ..vae.hunyuan.model import HunyuanVAE

QWEN = {
    "vocab_size": 1024, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
"""Qwen2.5-VL 7B's language model. Its vocabulary only makes the embedding table larger, so it is cut."""
QWEN_HEAD_DIM = 128


@torch.no_grad()
def random_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a scale at which signals neither die nor explode, and norms as they are born."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            parameter.normal_(0, 0.02 if "modulation" in name else fan_in**-0.5, generator=generator)
    return module.eval().requires_grad_(False)


def fewer_blocks(config: DiTConfig, num_blocks: int | None) -> DiTConfig:
    """The same width with fewer visual blocks.

    Raises:
        ValueError: fewer than one, or more than the variant has.
    """
    if num_blocks is None:
        return config
    if not 1 <= num_blocks <= config.num_visual_blocks:
        raise ValueError(f"--blocks {num_blocks} must be 1 to {config.num_visual_blocks}, which the variant has")
    return replace(config, num_visual_blocks=num_blocks)


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiffusionTransformer:
    """A DiT that computes what a trained one would, in time and memory."""
    # Built in its dtype at once: two copies of a large model need not fit.
    with torch.device("meta"):
        model = DiffusionTransformer(config).to(dtype)
    model = model.to_empty(device=device)
    for part in model.modules():
        if isinstance(part, (nn.RMSNorm, nn.LayerNorm)):
            part.reset_parameters()
        if getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)
    return random_(model)


def random_vae(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> HunyuanVAE | FluxVAE:
    """A full-width VAE."""
    vae = HunyuanVAE(config) if config.kind == "hunyuan" else FluxVAE(config)
    return random_(vae).to(device, dtype)


def random_qwen(num_layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model of Qwen2.5-VL 7B with `num_layers` of its layers."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    sections = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": QWEN["rope_theta"]}
    config = Qwen2_5_VLTextConfig(**{**QWEN, "num_hidden_layers": num_layers, "rope_scaling": sections})
    with torch.device(device):
        model = Qwen2_5_VLTextModel(config).to(dtype)
    return random_(model)


def random_text(config: DiTConfig, length: int, device: torch.device, dtype: torch.dtype) -> TextConditioning:
    """One encoded prompt of `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    return TextConditioning(
        embeds=torch.randn(1, length, config.in_text_dim, generator=generator).to(device, dtype),
        pooled=torch.randn(1, config.in_text_dim2, generator=generator).to(device, dtype),
        mask=torch.ones(1, length, dtype=torch.bool, device=device),
        full=True,
    )


def random_latents(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, equal on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
