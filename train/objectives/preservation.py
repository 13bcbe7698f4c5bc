"""Teaching a LoRA something new while the model keeps what it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..trainable import WithLora, lora_of
from .flow_matching import Batch, FlowMatching, mean_error, sample_sigmas


@dataclass
class Preserving:
    """Flow matching on new material, and on old one the answer of the model without its LoRA as the target.

    The old material is best made by the model itself from prompts it knows (`data.recall`). Its clean samples would
    serve as targets too (prior preservation, as in DreamBooth), but those come with the noise of every draw; what the
    frozen model predicts has none, so that few rows a step hold the LoRA back where it is not asked for.
    """

    new: FlowMatching
    old: Callable[[int, torch.Generator], Batch]
    """Batch number `index`, a function of (index, generator) alone."""
    weight: float = 1.0
    """Of the distance from the old answers, beside the loss of the new material."""

    def __call__(self, model: nn.Module, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """'loss', and its parts: 'new', and 'drift', the mean squared distance from the old answers."""
        new = self.new(model, index, generator)["loss"]
        drift = self.drift(model, index, generator)
        return {"loss": new + self.weight * drift, "new": new, "drift": drift}

    def drift(self, model: nn.Module, index: int, generator: torch.Generator) -> Tensor:
        """How far the LoRA moves the answers to old prompts."""
        batch = self.old(index, generator)
        sigmas = sample_sigmas(len(batch.latents), self.new.distribution, self.new.shift, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        with torch.no_grad(), _with_lora(model).bare() as base:
            target = self.new.velocity(base, batch, sigmas, noise)
        return mean_error(self.new.velocity(model, batch, sigmas, noise), target, batch.image)


def _with_lora(model: nn.Module) -> WithLora:
    """
    Raises:
        ValueError: all weights move, so that the model as it was is gone.
    """
    lora = lora_of(model)
    if lora is None:
        raise ValueError("old answers can be kept with a LoRA only: where all weights move there is no model as it was")
    return lora
