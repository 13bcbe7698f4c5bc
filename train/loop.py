"""The one training loop. What is minimised is an `Objective`; what moves is the model it is given."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import load_checkpoint, save_checkpoint
from .config import FitConfig
from .optim import MovingAverage, Optimizers, build_optimizers, learning_rate


class Objective(Protocol):
    """A loss over a batch that is a function of the step alone, so that a resumed run sees the same data."""

    def __call__(self, model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar losses by name; 'loss' is the one to minimise."""
        ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(model: nn.Module, objective: Objective, config: FitConfig, folder: Path) -> MovingAverage:
    """Train `model` in place and return the averaged weights.

    The folder holds the checkpoint, which an interrupted run goes on from, and progress.jsonl, a line every
    ten steps. A file named STOP in it ends the run after the current step, saved.

    Raises:
        RuntimeError: the loss is not finite; the last checkpoint stays.
        KeyboardInterrupt: stopped from outside, after saving.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = build_optimizers(model, config)
    average = MovingAverage(model, config.ema_decay)
    start = load_checkpoint(folder, model, optimizers, average)
    model.train()
    began = time.monotonic()
    with (folder / "progress.jsonl").open("a", encoding="utf-8") as log:
        bar = tqdm(
            range(start, config.num_steps), initial=start, total=config.num_steps, desc=folder.name, mininterval=5
        )
        for step in bar:
            losses = _train_step(model, objective, optimizers, average, config, step)
            if step % 10 == 9:
                record = {"step": step + 1, "seconds": round(time.monotonic() - began, 1), **losses}
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
            stopping = (folder / "STOP").exists()
            if stopping or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
                save_checkpoint(folder, step + 1, model, optimizers, average)
            if stopping:
                raise KeyboardInterrupt(f"stopped by {folder / 'STOP'} after step {step + 1}")
    return average


def _train_step(
    model: nn.Module, objective: Objective, optimizers: Optimizers, average: MovingAverage,
    config: FitConfig, step: int,
) -> dict[str, float]:  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        losses = objective(model, step, step_generator(config.seed, step))
    values = {name: float(value.detach()) for name, value in losses.items()}
    if not all(value == value and abs(value) != float("inf") for value in values.values()):
        raise RuntimeError(f"the loss is not finite at step {step + 1}: {values}; lower the learning rate")
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizers.step(learning_rate(step, config))
    average.update(model)
    return values
