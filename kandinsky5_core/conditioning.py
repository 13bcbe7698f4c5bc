"""What the DiT is told beside the latents: text, and images already in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class TextConditioning:
    """Encoded prompts. B is the batch, L the padded length."""

    embeds: torch.Tensor
    """(B, L, 3584) Qwen2.5-VL hidden states after the final norm, template cropped away."""
    pooled: torch.Tensor
    """(B, 768) CLIP pooled output."""
    mask: torch.Tensor
    """(B, L) bool, True for real tokens."""
    full: bool | None = None
    """Nothing is padded; None where nobody has looked (on an accelerator looking waits for it)."""

    def is_full(self) -> bool:
        """Nothing is padded."""
        return bool(self.mask.all()) if self.full is None else self.full

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextConditioning:
        """The same on another device, floats in `dtype`."""
        return TextConditioning(
            embeds=self.embeds.to(device, dtype), pooled=self.pooled.to(device, dtype), mask=self.mask.to(device)
        )

    def trimmed(self) -> TextConditioning:
        """Without the columns that are padding in every row: exact, since padded keys are masked out."""
        used = self.mask.any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        mask = self.mask[:, :length]
        return replace(self, embeds=self.embeds[:, :length], mask=mask, full=bool(mask.all()))

    def repeat(self, count: int) -> TextConditioning:
        """Each row `count` times, for a batch of clips of one prompt."""
        return TextConditioning(
            embeds=self.embeds.repeat_interleave(count, 0),
            pooled=self.pooled.repeat_interleave(count, 0),
            mask=self.mask.repeat_interleave(count, 0),
        )

    def rows(self, index: torch.Tensor) -> TextConditioning:
        """The rows at `index` (N,), a new batch."""
        return TextConditioning(embeds=self.embeds[index], pooled=self.pooled[index], mask=self.mask[index])


def joined(parts: Sequence[TextConditioning]) -> TextConditioning:
    """Several batches as one, padded to the longest."""
    length = max(part.mask.shape[1] for part in parts)
    return TextConditioning(
        embeds=torch.cat([F.pad(part.embeds, (0, 0, 0, length - part.embeds.shape[1])) for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
        mask=torch.cat([F.pad(part.mask, (0, length - part.mask.shape[1])) for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class ImageConditioning:
    """Clean latents to hold on to (image to video) or to look at (editing). Shapes as the noisy latents."""

    clean: torch.Tensor | None = None
    """(B, C, T, H, W) latents put into the noisy ones wherever `mask` is 1; image to video."""
    source: torch.Tensor | None = None
    """(B, C, T, H, W) latents for the source channels; editing. Zeros where None."""
    mask: torch.Tensor | None = None
    """(B, 1, T, 1 or H, 1 or W), 1 where `clean` or `source` is given. Zeros where None."""
