"""The one training loop. What is minimised is an `Objective`; what moves is the model it is given."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Progress, load_checkpoint, mark_best, prune, save_checkpoint
from .config import FitConfig
from .jobs import PROGRESS, STOP
from .optim import MovingAverage, Optimizers, build_optimizers, learning_rate

SMOOTHING = 0.97
"""Of the loss that is shown and watched for an explosion."""
SETTLED_STEPS = 20
"""Steps before which the smoothed loss is not judged."""


class Objective(Protocol):
    """A loss over a batch that is a function of the batch's number alone, so that a resumed run sees the same data."""

    def __call__(self, model: nn.Module, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar losses by name; 'loss' is the one to minimise."""
        ...


class Stopped(Exception):  # noqa: N818 - not an error
    """The run ended on request, after saving."""


class DivergedError(RuntimeError):
    """The loss exploded or is not finite; the last checkpoint stays."""


@dataclass
class Watcher:
    """What a run tells while it goes, and asks. This one writes progress.jsonl and heeds a file named STOP."""

    folder: Path

    def begin(self, progress: Progress, num_steps: int) -> None:
        """Before the first step, or the first after a resume."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lines = (self.folder / PROGRESS).open("a", encoding="utf-8")
        self._bar = tqdm(initial=progress.step, total=num_steps, desc=self.folder.name, mininterval=5, disable=None)

    def stepped(self, record: dict[str, float]) -> None:
        """After each step: its losses, gradient norm, rate and seconds."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        self._bar.update()
        self._bar.set_postfix({"loss": f"{record['smoothed']:.4f}"}, refresh=False)

    def stop_wanted(self) -> str:
        """Why the run shall end after this step; empty: it shall not."""
        return f"stopped by {self.folder / STOP}" if (self.folder / STOP).exists() else ""

    def validate(self, step: int, model: nn.Module) -> float | None:  # noqa: ARG002
        """Look at the averaged weights, which `model` holds for the while; the validation loss on steps that have
        one."""
        return None

    def validates(self, step: int) -> bool:  # noqa: ARG002
        """`validate` has something to do after this step."""
        return False

    def saved(self, progress: Progress, path: Path) -> None:
        """After each checkpoint."""

    def end(self) -> None:
        """Whatever way the run ended."""
        self._lines.close()
        self._bar.close()


def batch_generator(seed: int, index: int) -> torch.Generator:
    """Randomness of one batch, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def fit(
    model: nn.Module,
    objective: Objective,
    config: FitConfig,
    folder: Path,
    watcher: Watcher | None = None,
    accelerator: Accelerator | None = None,
) -> MovingAverage:
    """Train `model` in place and return the averaged weights.

    Everything random in a step follows from the seed and the batch's number, so that a run that was interrupted
    anywhere goes on as if it had not been.

    Args:
        folder: For checkpoints, from the newest of which an interrupted run goes on.
        accelerator: Of a run on several processes; each sees batches of its own. Gradients are averaged.

    Raises:
        Stopped: somebody asked for it; saved.
        DivergedError: the last checkpoint stays.
        OSError: no room for a checkpoint; the one before stays.
    """
    device = next(model.parameters()).device
    accelerator = accelerator or Accelerator(cpu=device.type == "cpu")
    check_distribution(accelerator)
    watcher = watcher or Watcher(folder)
    optimizers = build_optimizers(model, config)
    average = MovingAverage(model, config.ema_decay)
    progress = load_checkpoint(folder, model, optimizers, average)
    if progress.step > config.num_steps:
        raise ValueError(f"the checkpoint in {folder} is at step {progress.step}, beyond num_steps {config.num_steps}")
    model.train()
    wrapped = accelerator.prepare_model(model) if accelerator.num_processes > 1 else model
    run = _Run(wrapped, model, objective, config, folder, watcher, accelerator, optimizers, average, progress)
    if accelerator.is_main_process:
        watcher.begin(progress, config.num_steps)
    try:
        run.go()
    finally:
        if accelerator.is_main_process:
            watcher.end()
    return average


def check_distribution(accelerator: Accelerator) -> None:
    """That every process holds all weights.

    Raises:
        ValueError: accelerate was set up to shard them, which checkpoints here do not know.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this trainer runs data-parallel: choose "
            "multi-GPU without sharding in `accelerate config`"
        )


@dataclass
class _Run:
    """What one call of `fit` works with."""

    wrapped: nn.Module
    model: nn.Module
    objective: Objective
    config: FitConfig
    folder: Path
    watcher: Watcher
    accelerator: Accelerator
    optimizers: Optimizers
    average: MovingAverage
    progress: Progress

    def go(self) -> None:
        last_saved = self.progress.step
        while self.progress.step < self.config.num_steps:
            began = time.perf_counter()
            losses = self.train_step(self.progress.step)
            seconds = {"seconds": round(time.perf_counter() - began, 4)}
            self.progress.step += 1
            self.watch(losses)
            validation = self.validate()
            best = validation is not None and (self.progress.best is None or validation < self.progress.best)
            if best:
                self.progress.best = validation
            if self.accelerator.is_main_process:
                extra = {} if validation is None else {"validation": validation}
                told = {"step": self.progress.step, **losses, "smoothed": self.progress.smoothed, **extra, **seconds}
                self.watcher.stepped(told)
            reason = self.stop_reason()
            ended = self.progress.step == self.config.num_steps
            if reason or ended or best or self.progress.step - last_saved >= self.config.checkpoint_every:
                self.save(best=best)
                last_saved = self.progress.step
            if reason and not ended:
                raise Stopped(f"{reason} after step {self.progress.step}, saved")

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step; its losses (mean over batches and processes), gradient norm and rate."""
        config, accelerator = self.config, self.accelerator
        totals: dict[str, Tensor] = {}
        for part in range(config.accumulation):
            index = (step * config.accumulation + part) * accelerator.num_processes + accelerator.process_index
            last = part + 1 == config.accumulation
            # Dropout draws from the global generators.
            torch.manual_seed(config.seed * 1_000_003 + index)
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.bf16):
                    losses = self.objective(self.wrapped, index, batch_generator(config.seed, index))
                (losses["loss"] / config.accumulation).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / config.accumulation
        values = {name: float(accelerator.reduce(value, "mean")) for name, value in totals.items()}
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        if not math.isfinite(norm) or not all(math.isfinite(value) for value in values.values()):
            raise DivergedError(
                f"the loss is not finite at step {step + 1}: {values}, gradient norm {norm}; lower the learning rate "
                "and resume from the last checkpoint"
            )
        rate = learning_rate(step, config)
        self.optimizers.step(rate)
        self.average.update(self.model)
        return {**values, "grad_norm": norm, "rate": rate}

    def watch(self, losses: dict[str, float]) -> None:
        """Smooth the loss, and end the run when it explodes."""
        progress, loss = self.progress, losses["loss"]
        # A plain mean at first, so that one lucky batch is no measure.
        keep = min(SMOOTHING, (progress.step - 1) / (progress.step + 1))
        progress.smoothed = loss if progress.smoothed is None else keep * progress.smoothed + (1 - keep) * loss
        if progress.step < SETTLED_STEPS:
            return
        progress.lowest = min(progress.smoothed, progress.lowest or math.inf)
        if progress.smoothed > self.config.explode_factor * progress.lowest:
            raise DivergedError(
                f"the loss exploded: {progress.smoothed:.4g} at step {progress.step}, {self.config.explode_factor:g} "
                f"times its lowest value {progress.lowest:.4g}; lower the learning rate and start again, or resume "
                "from the last checkpoint"
            )

    def validate(self) -> float | None:
        """The watcher's validation loss with the averaged weights in place; the model is as before afterwards."""
        step = self.progress.step
        if not self.watcher.validates(step):
            return None
        value = None
        if self.accelerator.is_main_process:
            with torch.random.fork_rng(), self.average.applied(self.model):
                self.model.eval()
                value = self.watcher.validate(step, self.model)
                self.model.train()
        value = self.from_main(math.nan if value is None else value)
        return None if math.isnan(value) else value

    def from_main(self, value: float) -> float:
        """The main process's value, in all of them."""
        if self.accelerator.num_processes == 1:
            return value
        told = value if self.accelerator.is_main_process else 0.0
        return float(self.accelerator.reduce(torch.tensor([told], device=self.accelerator.device), "sum"))

    def stop_reason(self) -> str:
        """The main process's, for all to end together."""
        reason = self.watcher.stop_wanted() if self.accelerator.is_main_process else ""
        return reason or ("stopped" if self.from_main(float(bool(reason))) else "")

    def save(self, *, best: bool) -> None:
        if self.accelerator.is_main_process:
            path = save_checkpoint(self.folder, self.progress, self.model, self.optimizers, self.average)
            if best:
                mark_best(self.folder, self.progress)
            prune(self.folder, self.config.keep_last)
            self.watcher.saved(self.progress, path)
        self.accelerator.wait_for_everyone()
