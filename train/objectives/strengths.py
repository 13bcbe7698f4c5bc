"""Training a LoRA for being used weaker than whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..loop import Objective
from ..trainable import lora_of


@dataclass
class AtStrengths:
    """Another objective, each step with the LoRA at a random strength from `least` to 1.

    What a LoRA does grows with its strength by leaps rather than evenly: at half of it often nothing is seen. A soup
    of two gives each a half, so its parts have to work there.
    """

    objective: Objective
    least: float

    def __call__(self, model: nn.Module, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of `objective`.

        Raises:
            ValueError: all weights move, so there is nothing to weaken.
        """
        lora = lora_of(model)
        if lora is None:
            raise ValueError("least_strength is for a LoRA: where all weights move there is no strength")
        # It stays after this call: gradient checkpointing runs the blocks again in the backward pass.
        lora.strength = self.least + (1 - self.least) * float(torch.rand((), generator=generator))
        return self.objective(model, index, generator)
