"""The two kinds of CrossDiT block (report section 5.3)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from ..attention.dense import AttentionFn, dense_attention
from ..config import DiTConfig
from .layers import Attention, FeedForward, Modulation, gated_add, modulated_norm
from .rope import Rope


class TextBlock(nn.Module):
    """Refines the text stream: self-attention and feed-forward, modulated by time."""

    def __init__(self, config: DiTConfig, *, ops: ModuleType) -> None:
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6, ops=ops)
        self.self_attention = Attention(config.model_dim, config.head_dim, ops=ops)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, ops=ops)

    def forward(self, text: Tensor, time_embed: Tensor, rope: Rope, text_mask: Tensor | None) -> Tensor:
        """text (B, L, D), time_embed (B, time_dim), text_mask (B, L) bool."""
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.text_modulation(time_embed)
        normed = modulated_norm(text, attn_shift, attn_scale)
        text = gated_add(text, attn_gate, self.self_attention(normed, normed, dense_attention, rope, text_mask))
        normed = modulated_norm(text, ff_shift, ff_scale)
        return gated_add(text, ff_gate, self.feed_forward(normed))


class VisualBlock(nn.Module):
    """Self-attention over the clip, cross-attention to the text, feed-forward, each modulated by time."""

    def __init__(self, config: DiTConfig, *, ops: ModuleType) -> None:
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9, ops=ops)
        self.self_attention = Attention(config.model_dim, config.head_dim, ops=ops)
        self.cross_attention = Attention(config.model_dim, config.head_dim, ops=ops)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, ops=ops)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        time_embed: Tensor,
        rope: Rope,
        attention: AttentionFn,
        text_mask: Tensor | None,
    ) -> Tensor:
        """visual (B, S, D), text (B, L, D), time_embed (B, time_dim); `attention` is that of the visual tokens."""
        (self_shift, self_scale, self_gate, cross_shift, cross_scale, cross_gate,
         ff_shift, ff_scale, ff_gate) = self.visual_modulation(time_embed)  # fmt: skip
        normed = modulated_norm(visual, self_shift, self_scale)
        visual = gated_add(visual, self_gate, self.self_attention(normed, normed, attention, rope))
        normed = modulated_norm(visual, cross_shift, cross_scale)
        attended = self.cross_attention(normed, text, dense_attention, key_mask=text_mask)
        visual = gated_add(visual, cross_gate, attended)
        normed = modulated_norm(visual, ff_shift, ff_scale)
        return gated_add(visual, ff_gate, self.feed_forward(normed))
