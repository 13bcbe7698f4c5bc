"""Samplers: each integrates dx/dsigma = velocity(x, sigma) along a given schedule.

All share one head: (velocity_fn, latents, sigmas, on_step). Updates are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(latents, sigma ()) -> velocity, both (B, C, T, H, W)."""

OnStep = Callable[[int, int, Tensor], None]
"""Called after each step with (finished steps, all steps, latents); may raise to cancel."""


class Sampler(Protocol):
    """What every entry of `SAMPLERS` is."""

    def __call__(
        self, velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None
    ) -> Tensor: ...


def euler(velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First order, one evaluation a step; what the released models are sampled with."""
    x = latents.float()
    for i, step_size in enumerate(sigmas.diff()):
        x = x + step_size * velocity_fn(x, sigmas[i]).float()
        _report(on_step, i, sigmas, x)
    return x


def heun(velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Second order, two evaluations a step (one in the last: no model is trained at sigma 0)."""
    x = latents.float()
    for i, step_size in enumerate(sigmas.diff()):
        slope = velocity_fn(x, sigmas[i]).float()
        if sigmas[i + 1] > 0:
            slope = (slope + velocity_fn(x + step_size * slope, sigmas[i + 1]).float()) / 2
        x = x + step_size * slope
        _report(on_step, i, sigmas, x)
    return x


def adams_bashforth_2(
    velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None
) -> Tensor:
    """Second order, one evaluation a step: the slope is extrapolated from this step's and the last one's.

    Variable-step form of the two-step Adams-Bashforth method; the first step is Euler's.
    """
    x = latents.float()
    previous_slope, previous_size = None, None
    for i, step_size in enumerate(sigmas.diff()):
        slope = velocity_fn(x, sigmas[i]).float()
        if previous_slope is None:
            x = x + step_size * slope
        else:
            half_ratio = step_size / (2 * previous_size)
            x = x + step_size * ((1 + half_ratio) * slope - half_ratio * previous_slope)
        previous_slope, previous_size = slope, step_size
        _report(on_step, i, sigmas, x)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "ab2": adams_bashforth_2}


def _report(on_step: OnStep | None, index: int, sigmas: Tensor, latents: Tensor) -> None:
    if on_step is not None:
        on_step(index + 1, len(sigmas) - 1, latents)
