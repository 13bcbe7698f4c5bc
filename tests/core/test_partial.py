"""Sampling from given latents, and around them."""

import pytest
import torch

from kandinsky5_core.sampling.partial import PartialNoise
from kandinsky5_core.sampling.samplers import SAMPLERS
from kandinsky5_core.sampling.schedule import flow_schedule, shifted

SHAPE = (2, 4, 3, 6, 6)


def velocity(latents, sigma):
    return torch.tanh(latents) * (1 + sigma)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_may_not_change_comes_back_exactly(name):
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    strength = torch.zeros(1, 1, 3, 6, 6)
    strength[..., :3] = 1
    partial = PartialNoise(clean=clean, strength=strength)
    sigmas = flow_schedule(12, 5.0)
    start = partial.start(noise, sigmas[0])
    result = SAMPLERS[name](partial.restrict(velocity, noise, 5.0), start, sigmas)
    torch.testing.assert_close(result[..., 3:], clean[..., 3:], atol=1e-5, rtol=0)
    free = SAMPLERS[name](velocity, noise, sigmas)
    torch.testing.assert_close(result[..., :3], free[..., :3])


def test_grey_changes_as_much_as_that_denoise_would():
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    steps, shift = 10, 3.0
    partial = PartialNoise(clean=clean, strength=torch.full((1, 1, 3, 6, 6), 0.4))
    sigmas = flow_schedule(steps, shift)
    grey = SAMPLERS["euler"](partial.restrict(velocity, noise, shift), partial.start(noise, sigmas[0]), sigmas)
    whole = PartialNoise(clean=clean)
    tail = flow_schedule(4, shift, denoise=0.4)
    torch.testing.assert_close(tail, sigmas[6:], atol=1e-6, rtol=0)
    alone = SAMPLERS["euler"](whole.restrict(velocity, noise, shift), whole.start(noise, tail[0]), tail)
    torch.testing.assert_close(grey, alone, atol=1e-5, rtol=1e-5)


def test_denoise_begins_at_its_warped_level():
    sigmas = flow_schedule(8, 5.0, denoise=0.5)
    assert len(sigmas) == 9
    assert float(sigmas[0]) == pytest.approx(float(shifted(torch.tensor(0.5), 5.0)))
    assert float(sigmas[-1]) == 0
    for bad in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="denoise must be above 0"):
            flow_schedule(8, 5.0, denoise=bad)
