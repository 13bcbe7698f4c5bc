"""What a model makes of prompts that it knows: material by which it keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kandinsky5_core.conditioning import joined
from kandinsky5_core.nano.score import encode_rows, sample_rows
from kandinsky5_core.pipeline import Models
from kandinsky5_core.request import Request

from .rows import RowBatches

BATCH = 12


@torch.no_grad()
def recall(models: Models, prompts: Sequence[str], *, num_steps: int, seed: int, batch_size: int) -> RowBatches:
    """One clip of the variant's size for each prompt, as latents; row i has the noise of seed+i.

    Args:
        num_steps: Of sampling; half the variant's will do, since only the model's answers to them are kept.
        batch_size: Of the batches that are drawn from them.
    """
    requests = [Request(prompt=prompt, seed=seed + row, num_steps=num_steps) for row, prompt in enumerate(prompts)]
    parts = [encode_rows(models, requests[start : start + BATCH]) for start in range(0, len(requests), BATCH)]
    latents = torch.cat([sample_rows(models, part) for part in parts])
    empty = models.text_encoder.encode([""], task="t2v", max_tokens=models.variant.max_text_tokens)
    return RowBatches(latents, joined([*(part.positive for part in parts), empty.trimmed()]), batch_size)
