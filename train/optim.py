"""Optimizers, learning-rate schedule and moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import FitConfig


def learning_rate(step: int, config: FitConfig) -> float:
    """Rate for step `step` (from 0): linear warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = min(1.0, step / config.num_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warmup * (config.final_rate + (1 - config.final_rate) * cosine)


class Optimizers:
    """One optimizer, or several over disjoint parameters, stepped as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    def step(self, rate: float) -> None:
        """One update at learning rate `rate`; gradients are gone afterwards."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state value as a tensor, by 'part.parameter.name'."""
        return {
            f"{number}.{index}.{key}": torch.as_tensor(value)
            for number, part in enumerate(self.parts)
            for index, parameter in enumerate(_parameters(part))
            for key, value in part.state[parameter].items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        # Not through state_dict: bitsandbytes wraps its own in a form that is no tensor.
        parameters = [_parameters(part) for part in self.parts]
        for name, value in tensors.items():
            number, index, key = name.split(".", 2)
            parameter = parameters[int(number)][int(index)]
            self.parts[int(number)].state[parameter][key] = _as_state(value, parameter)


def _parameters(part: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _as_state(value: Tensor, parameter: Tensor) -> Tensor | int:
    """A copy, for what is loaded from a file may be a view of it; counts are numbers again."""
    if value.dim() == 0:
        return value.clone() if value.is_floating_point() else int(value)
    return value.clone().to(parameter.device)


def build_optimizers(model: nn.Module, config: FitConfig) -> Optimizers:
    """What `config.optimizer` names.

    Muon orthogonalises the update of each matrix (Jordan et al. 2024); its rate is scaled to AdamW's, so one
    learning rate serves both parts.
    """
    adamw = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return Optimizers([torch.optim.AdamW(parameters, **adamw)])
    if config.optimizer == "adamw8bit":
        return Optimizers([_eight_bit()(parameters, **adamw)])
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = "blocks" in name and "modulation" not in name and parameter.dim() == 2
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    # A LoRA moves nothing but matrices.
    return Optimizers([muon, torch.optim.AdamW(rest, **adamw)] if rest else [muon])


def _eight_bit() -> type[torch.optim.Optimizer]:
    """AdamW with its moments in eight bits.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        message = "optimizer 'adamw8bit' needs bitsandbytes (pip install bitsandbytes); or use 'adamw'"
        raise ValueError(message) from error
    return AdamW8bit


class MovingAverage:
    """Exponential moving average of a module's parameters, in fp32; with decay 0 the parameters themselves."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        if decay:
            self.weights = {name: tensor.float().clone() for name, tensor in self.weights.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self.num_updates += 1
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach().float(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by parameter name."""
        return self.weights

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the parameters."""
        return self.weights if self.decay else {}

    def restore(self, weights: dict[str, Tensor], num_updates: int) -> None:
        """Go on from what `saved` gave."""
        self.num_updates = num_updates
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model for a while; its own come back bit by bit."""
        if not self.decay:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        _copy_into(model, self.weights)
        try:
            yield
        finally:
            _copy_into(model, own)


@torch.no_grad()
def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
