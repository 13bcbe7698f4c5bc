"""CrossDiT, the diffusion transformer of the Kandinsky 5.0 family (report section 5.2).

Attribute names are the checkpoint's, so official, diffusers and ComfyUI files load unchanged. The model knows
nothing of devices, offloading, compilation or checkpointing: those are applied from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from ..conditioning import TextConditioning
from ..config import DiTConfig
from .blocks import TextBlock, VisualBlock
from .embeddings import OutLayer, TextEmbeddings, TimeEmbeddings, VisualEmbeddings
from .plan import VisualPlan
from .rope import Rope, rope_table, text_angles

VisualBlocks = Callable[[Tensor, Tensor, Tensor, VisualPlan, Tensor | None], Tensor]
"""(tokens, text, time_embed, plan, text_mask) -> tokens; `DiffusionTransformer.visual_blocks`."""
AroundBlocks = Callable[[VisualBlocks, Tensor, Tensor, Tensor, VisualPlan, Tensor | None], Tensor]
"""Called with the visual blocks and what they would get; a step cache, say."""


class DiffusionTransformer(nn.Module):
    """Noisy latents, a timestep and text to the velocity (noise - clean)."""

    def __init__(self, config: DiTConfig, *, ops: ModuleType = nn) -> None:
        super().__init__()
        self.config = config
        dim, time_dim = config.model_dim, config.time_dim
        self.time_embeddings = TimeEmbeddings(dim, time_dim, ops=ops)
        self.text_embeddings = TextEmbeddings(config.in_text_dim, dim, ops=ops)
        self.pooled_text_embeddings = TextEmbeddings(config.in_text_dim2, time_dim, ops=ops)
        self.visual_embeddings = VisualEmbeddings(config.input_channels, dim, config.patch_size, ops=ops)
        self.text_transformer_blocks = nn.ModuleList(
            [TextBlock(config, ops=ops) for _ in range(config.num_text_blocks)]
        )
        self.visual_transformer_blocks = nn.ModuleList(
            [VisualBlock(config, ops=ops) for _ in range(config.num_visual_blocks)]
        )
        self.out_layer = OutLayer(dim, time_dim, config.out_visual_dim, config.patch_size, ops=ops)

    def forward(
        self, latents: Tensor, timestep: Tensor, text: TextConditioning, plan: VisualPlan,
        around: AroundBlocks | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict the velocity.

        Args:
            latents: (B, input_channels, T, H, W): noisy latents, then source latents and mask where the model
                has them (`sampling.guidance.model_input`).
            timestep: (B,) 1000*sigma.
            text: Encoded captions of the batch; padded keys are masked.
            plan: Positions and attention for this size (`dit.plan.plan_visual`).
            around: Called instead of the visual blocks, with them as its first argument.

        Returns:
            (B, out_visual_dim, T, H, W) in the dtype of `latents`.
        """
        text_mask = None if text.is_full() else text.mask
        time_embed = self.time_embeddings(timestep) + self.pooled_text_embeddings(text.pooled).float()
        rope = plan.text_rope(text.embeds.shape[1], self.config.head_dim, text.embeds.device)
        text_tokens = self.refine_text(text.embeds, time_embed, text_mask, rope)
        blocks = self.visual_blocks if around is None else partial(around, self.visual_blocks)
        # The first tokens get no name here: they would stay as long as it does.
        tokens = blocks(self.visual_tokens(latents, plan), text_tokens, time_embed, plan, text_mask)
        if plan.nabla is not None:
            tokens = plan.nabla.restore(tokens)
        return self.out_layer(tokens, time_embed, plan.grid).to(latents.dtype)

    def visual_tokens(self, latents: Tensor, plan: VisualPlan) -> Tensor:
        """(B, input_channels, T, H, W) to the (B, S, D) that enter the visual blocks, in their order."""
        tokens = self.visual_embeddings(latents)
        return tokens if plan.nabla is None else plan.nabla.reorder(tokens)

    def refine_text(
        self, embeds: Tensor, time_embed: Tensor, text_mask: Tensor | None, rope: Rope | None = None
    ) -> Tensor:
        """(B, L, in_text_dim) to the (B, L, D) that the visual blocks attend to.

        The time embedding modulates these blocks, so the text's keys and values change every step: they cannot be
        kept from one step to the next.
        """
        tokens = self.text_embeddings(embeds)
        rope = rope or rope_table(text_angles(embeds.shape[1], self.config.head_dim, embeds.device))
        for block in self.text_transformer_blocks:
            tokens = block(tokens, time_embed, rope, text_mask)
        return tokens

    def visual_blocks(
        self, tokens: Tensor, text: Tensor, time_embed: Tensor, plan: VisualPlan, text_mask: Tensor | None
    ) -> Tensor:
        """The long part of the forward pass; a step cache stands around just this."""
        for block in self.visual_transformer_blocks:
            tokens = block(tokens, text, time_embed, plan.rope, plan.attention, text_mask)
        return tokens


@torch.no_grad()
def initialise(model: DiffusionTransformer, generator: torch.Generator | None = None) -> None:
    """Weights to start training from: Xavier for linears, zeros for modulation and the output (report 5.3)."""
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("out_layer.out_layer") or name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter, generator=generator)
