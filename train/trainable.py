"""What moves: all weights of a model, or a LoRA on some of its layers, with the rest frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoraConfig


class LoraPair(nn.Module):
    """Two matrices beside a linear layer: scale * up(down(dropout(x))), zero at the start."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5, generator=generator)
        self.scale, self.dropout = config.scale, nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's dtype; the matrices stay fp32."""
        hidden = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.scale * nn.functional.linear(hidden, self.lora_B.to(x.dtype))


class WithLora(nn.Module):
    """A frozen model with LoRA pairs on its layers; parameters and state are those of the pairs alone.

    So the training loop, which moves, averages and saves whatever parameters it is given, needs no case of its own.
    """

    def __init__(self, base: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        """
        Args:
            base: Frozen here, and hooked until `detach`.

        Raises:
            ValueError: no layer of the model ends with a target suffix.
        """
        super().__init__()
        # Not a submodule: its weights are nobody's to save here.
        object.__setattr__(self, "base", base.requires_grad_(False))
        targets = {name: module for name, module in base.named_modules() if name.endswith(config.targets)}
        linears = {name: module for name, module in targets.items() if isinstance(module, nn.Linear)}
        if not linears:
            raise ValueError(f"no linear layer of the model ends with {', '.join(config.targets)}; use other targets")
        self.lora_config = config
        pairs = {_key(name): LoraPair(linear, config, generator) for name, linear in linears.items()}
        self.pairs = nn.ModuleDict(pairs)
        self._adds = True
        self.strength = 1.0
        """Of the pairs while training; in eval mode they count whole."""
        self._hooks = [linear.register_forward_hook(self._adding(_key(name))) for name, linear in linears.items()]

    @property
    def config(self) -> Any:
        """The base's."""
        return self.base.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base with its pairs."""
        return self.base(*args, **kwargs)

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """The base as it was, for a while."""
        self._adds = False
        try:
            yield self.base
        finally:
            self._adds = True

    def _adding(self, key: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
            if not self._adds:
                return output
            added = self.pairs[key](inputs[0])
            return output + (self.strength * added if self.training and self.strength != 1 else added)

        return hook

    def detach(self) -> nn.Module:
        """Take the pairs off; the base as it was."""
        for hook in self._hooks:
            hook.remove()
        return self.base


def lora_of(model: nn.Module) -> WithLora | None:
    """The LoRA inside accelerate's wrapper; None where all weights move."""
    model = getattr(model, "module", model)
    return model if isinstance(model, WithLora) else None


def lora_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `WithLora`, or an average of it, by module of the base: `X.lora_A.weight`, `X.lora_B.weight`."""
    found = {}
    for name, tensor in weights.items():
        module, part = name.removeprefix("pairs.").rsplit(".", 1)
        found[f"{module.replace(_DOT, '.')}.{part}.weight"] = tensor.detach().float().contiguous()
    return found


_DOT = "/"


def _key(name: str) -> str:
    return name.replace(".", _DOT)  # ModuleDict takes no dots
