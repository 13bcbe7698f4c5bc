"""How many numbers the networks hold and how many bytes they take, in closed form: no network is built.

Element sizes are bytes of one number in the run's dtype: 2 for bf16 and fp16, 4 for fp32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..config import FLUX_VAE, HUNYUAN_VAE, DiTConfig, VAEConfig, Variant
from .options import AS_IS

SCALE_BYTES = 4
"""Of each row of an eight-bit matrix."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one number in NF4: four bits, a byte of scale for 64 numbers, and a scale in fp32 for 256 of those."""
RELEASED_VAES = {HUNYUAN_VAE: 246_478_803, FLUX_VAE: 83_819_683}
"""Numbers in the released VAEs."""
_QWEN_VISION = 676_550_144
_CLIP_L_TEXT = 123_060_480
_NANO_VISION = 257_344


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers in the weights of a network: in matrices that can be quantised, the rows of these, and the rest."""

    matrices: int
    rows: int
    rest: int

    @property
    def total(self) -> int:
        return self.matrices + self.rest

    def num_bytes(self, weights: str, element_size: int) -> int:
        """Bytes with the matrices as `weights` says: 'as-is', 'fp8', 'int8' or 'nf4'."""
        rest = self.rest * element_size
        if weights == AS_IS:
            return self.matrices * element_size + rest
        if weights == "nf4":
            return round(self.matrices * NF4_BYTES) + rest
        return self.matrices + self.rows * SCALE_BYTES + rest

    def __add__(self, other: Counts) -> Counts:
        return Counts(matrices=self.matrices + other.matrices, rows=self.rows + other.rows, rest=self.rest + other.rest)

    def __mul__(self, count: int) -> Counts:
        return Counts(matrices=self.matrices * count, rows=self.rows * count, rest=self.rest * count)


def _block(config: DiTConfig, *, attentions: int, modulated: int) -> Counts:
    dim, hidden, time = config.model_dim, config.ff_dim, config.time_dim
    norms_and_biases = attentions * (4 * dim + 2 * config.head_dim)
    return Counts(
        matrices=attentions * 4 * dim**2 + 2 * dim * hidden, rows=attentions * 4 * dim + hidden + dim,
        rest=norms_and_biases + modulated * dim * (time + 1),
    )  # fmt: skip


def text_block(config: DiTConfig) -> Counts:
    """One block that refines the text."""
    return _block(config, attentions=1, modulated=6)


def visual_block(config: DiTConfig) -> Counts:
    """One visual block."""
    return _block(config, attentions=2, modulated=9)


def dit_ends(config: DiTConfig) -> Counts:
    """All of the DiT but its blocks; none of it is quantised."""
    dim, time, cells = config.model_dim, config.time_dim, prod(config.patch_size)
    time_embeddings = (dim + 1) * time + (time + 1) * time
    text_embeddings = (config.in_text_dim + 3) * dim + (config.in_text_dim2 + 3) * time
    visual_embeddings = (config.input_channels * cells + 1) * dim
    out_layer = 2 * dim * (time + 1) + (dim + 1) * config.out_visual_dim * cells
    return Counts(matrices=0, rows=0, rest=time_embeddings + text_embeddings + visual_embeddings + out_layer)


def dit(config: DiTConfig) -> Counts:
    """The whole DiT."""
    blocks = text_block(config) * config.num_text_blocks + visual_block(config) * config.num_visual_blocks
    return blocks + dit_ends(config)


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """What the text encoders of a variant are made of."""

    vocabulary: int = 152_064
    dim: int = 3584
    hidden: int = 18_944
    layers: int = 28
    heads: int = 28
    key_heads: int = 4
    head_dim: int = 128
    vision: int = _QWEN_VISION
    """Numbers of the vision tower; it is loaded where the file holds it."""
    clip: int = _CLIP_L_TEXT
    """Numbers of the CLIP text tower, which stays in fp32."""

    def qwen_layer(self) -> Counts:
        """One layer of the language model."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return Counts(
            matrices=self.dim * (2 * queries + 2 * keys + 3 * self.hidden),
            rows=queries + 2 * keys + 2 * self.dim + 2 * self.hidden,
            rest=queries + 2 * keys + 2 * self.dim,
        )

    def qwen(self) -> Counts:
        """Qwen without the head that writes text."""
        rest = Counts(matrices=0, rows=0, rest=(self.vocabulary + 1) * self.dim + self.vision)
        return self.qwen_layer() * self.layers + rest

    def num_bytes(self, text_weights: str, element_size: int, *, head: bool = False) -> int:
        """Both encoders; `head`: with what writes text, which stays wide."""
        written = self.vocabulary * self.dim * element_size if head else 0
        return self.qwen().num_bytes(text_weights, element_size) + 4 * self.clip + written


def text_sizes(variant: Variant) -> TextSizes:
    """Of the released encoders, or of those embedded with a Nano model."""
    if not variant.name.startswith("nano-"):
        return TextSizes()
    folder = Path(__file__).parents[1] / "nano" / ("video" if variant.vae.kind == "hunyuan" else "image")
    qwen = json.loads((folder / "qwen" / "config.json").read_text(encoding="utf-8"))
    qwen = qwen.get("text_config", qwen)
    clip = json.loads((folder / "clip" / "config.json").read_text(encoding="utf-8"))
    return TextSizes(
        vocabulary=qwen["vocab_size"], dim=qwen["hidden_size"], hidden=qwen["intermediate_size"],
        layers=qwen["num_hidden_layers"], heads=qwen["num_attention_heads"], key_heads=qwen["num_key_value_heads"],
        head_dim=qwen["hidden_size"] // qwen["num_attention_heads"], vision=_NANO_VISION, clip=_clip_numbers(clip),
    )  # fmt: skip


def _clip_numbers(clip: dict[str, int]) -> int:
    dim, hidden = clip["hidden_size"], clip["intermediate_size"]
    layer = 4 * dim * (dim + 1) + 2 * dim * hidden + hidden + dim + 4 * dim
    positions = clip["vocab_size"] + clip["max_position_embeddings"]
    return positions * dim + clip["num_hidden_layers"] * layer + 2 * dim


def vae(config: VAEConfig) -> int:
    """Numbers in a VAE; one that was not released is built on the meta device to count them."""
    if config in RELEASED_VAES:
        return RELEASED_VAES[config]
    import torch

    from ..vae.flux import FluxVAE
    from ..vae.hunyuan.model import HunyuanVAE

    with torch.device("meta"):
        network = (FluxVAE if config.kind == "flux" else HunyuanVAE)(config)
    return sum(parameter.numel() for parameter in network.parameters())
