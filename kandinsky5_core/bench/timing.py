"""Times of several ways to do one thing, taken in turns: what else the machine does then hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Samples:
    """Wall and process time of the runs of one function, in order."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of the process, over all its threads: what other processes do disturbs it less."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)

    def figures(self) -> dict[str, float | int]:
        """What a report says about them."""
        return {
            "seconds": self.median, "seconds_best": min(self.seconds), "cpu_seconds": self.cpu_median,
            "runs": len(self.seconds),
        }  # fmt: skip


def ratio(other: Samples, ours: Samples) -> dict[str, float]:
    """How many times as fast `ours` is: by medians, by the median over rounds, and by process time."""
    paired = [a / b for a, b in zip(other.seconds, ours.seconds, strict=True)]
    return {
        "ratio": other.median / ours.median,
        "ratio_paired": statistics.median(paired),
        "ratio_best": min(other.seconds) / min(ours.seconds),
        "ratio_cpu": other.cpu_median / ours.cpu_median,
    }


def alternate(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 5, warm_ups: int = 1,
    before: Callable[[str], None] | None = None,
) -> dict[str, Samples]:  # fmt: skip
    """Run all functions `repeats` times in turns; each round begins with another one.

    Args:
        warm_ups: Rounds that are not counted.
        before: Called with a function's name before each of its runs, outside the time.

    Raises:
        ValueError: no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats} must be at least 1")
    samples = {name: Samples() for name in functions}
    names = list(functions)
    for number in range(-warm_ups, repeats):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if before is not None:
                before(name)
            wall, cpu = timed(functions[name], device)
            if number >= 0:
                samples[name].seconds.append(wall)
                samples[name].cpu_seconds.append(cpu)
    return samples


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall and process seconds of one run, the accelerator's work included."""
    synchronise(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    function()
    synchronise(device)
    return time.perf_counter() - began, time.process_time() - began_cpu


def synchronise(device: torch.device) -> None:
    """Wait for what an accelerator has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
