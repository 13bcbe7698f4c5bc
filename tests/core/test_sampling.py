"""Schedule, samplers, guidance and first-frame rules."""

import math

import pytest
import torch

from kandinsky5_core.conditioning import ImageConditioning, TextConditioning
from kandinsky5_core.config import DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.sampling.first_frame import normalise_first_frames
from kandinsky5_core.sampling.guidance import guided_velocity, hold, model_input
from kandinsky5_core.sampling.noise import initial_noise
from kandinsky5_core.sampling.samplers import SAMPLERS
from kandinsky5_core.sampling.schedule import flow_schedule
from kandinsky5_core.shapes import LatentShape

GOLDEN_5 = "1 .98684 .97222 .95588 .9375 .91667 .89286 .86538 .83333 .79545 .75 .69444 .625 .53571 .41667 .25 0"
GOLDEN_10 = "1 .99338 .98592 .97744 .96774 .95652 .9434 .92784 .90909 .88608 .85714 .81967 .76923 .69767 .58824 .4 0"


@pytest.mark.parametrize(("shift", "golden"), [(5.0, GOLDEN_5), (10.0, GOLDEN_10)])
def test_golden_schedules(shift: float, golden: str) -> None:
    expected = torch.tensor([float(value) for value in golden.split()])
    torch.testing.assert_close(flow_schedule(16, shift), expected, atol=6e-6, rtol=0)


@pytest.mark.parametrize(("shift", "last"), [(3.0, 0.0577), (5.0, 0.0926), (10.0, 0.1695)])
def test_last_evaluated_sigma_of_fifty_steps(shift: float, last: float) -> None:
    assert abs(float(flow_schedule(50, shift)[-2]) - last) < 5e-5


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (-1, 5.0), (10, 0.0), (10, math.nan)])
def test_bad_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=r"steps|shift"):
        flow_schedule(steps, shift)


def integration_error(name: str, num_steps: int) -> float:
    """dx/ds = cos(3s)*x from s=1 to 0 has the closed form x(0) = x(1)*exp(-sin(3)/3)."""
    start = torch.ones(1, 1, 1, 1, 1)
    end = SAMPLERS[name](lambda x, sigma: torch.cos(3 * sigma) * x, start, flow_schedule(num_steps, 2.0))
    return abs(float(end) - math.exp(-math.sin(3.0) / 3))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    measured = math.log2(integration_error(name, 40) / integration_error(name, 80))
    assert abs(measured - order) < 0.2


def test_heun_is_second_order_up_to_its_euler_end() -> None:
    # The last step is Euler's, of size O(h): its local error O(h^2) keeps the global order at two.
    measured = math.log2(integration_error("heun", 80) / integration_error("heun", 160))
    assert abs(measured - 2) < 0.25


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 10), ("ab2", 10), ("heun", 19)])
def test_evaluations_and_callbacks(name: str, evaluations: int) -> None:
    calls, steps = [], []
    SAMPLERS[name](
        lambda x, sigma: calls.append(float(sigma)) or x,
        torch.zeros(1, 1, 1, 1, 1),
        flow_schedule(10, 3.0),
        lambda step, total, latents: steps.append((step, total)),
    )
    assert len(calls) == evaluations
    assert min(calls) > 0
    assert steps == [(step, 10) for step in range(1, 11)]


def test_straight_flows_are_exact_with_every_sampler() -> None:
    noise, clean = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    for sampler in SAMPLERS.values():
        end = sampler(lambda x, sigma: noise - clean, noise, flow_schedule(7, 5.0))
        torch.testing.assert_close(end, clean, atol=1e-5, rtol=1e-5)


def test_a_callback_can_cancel() -> None:
    def stop(step: int, total: int, latents: torch.Tensor) -> None:
        if step == 2:
            raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        SAMPLERS["euler"](lambda x, s: calls.append(s) or x, torch.zeros(1), flow_schedule(9, 3.0), stop)
    assert len(calls) == 2


def test_noise_of_a_batch_is_that_of_consecutive_seeds() -> None:
    shape = LatentShape(3, 16, 2, 4, 4)
    batch = initial_noise(shape, 41)
    singles = [initial_noise(shape._replace(batch=1), 41 + row) for row in range(3)]
    assert torch.equal(batch, torch.cat(singles))
    assert not torch.equal(batch[0], batch[1])
    assert abs(float(batch.std()) - 1) < 0.1


CONFIG = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
)  # fmt: skip


def conditioning(seed: int, batch: int = 1) -> TextConditioning:
    generator = torch.Generator().manual_seed(seed)
    return TextConditioning(
        embeds=torch.randn(batch, 5, 8, generator=generator), pooled=torch.randn(batch, 6, generator=generator),
        mask=torch.ones(batch, 5, dtype=torch.bool),
    )  # fmt: skip


def test_guidance_mixes_two_passes_and_one_costs_one() -> None:
    torch.manual_seed(0)
    dit = DiffusionTransformer(CONFIG).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    calls = []
    dit.register_forward_hook(lambda *args: calls.append(args[2]))
    plan, positive, negative = plan_visual(CONFIG, (2, 2, 2), (1.0, 1.0, 1.0)), conditioning(1), conditioning(2)
    latents, sigma = torch.randn(1, 4, 2, 4, 4), torch.tensor(0.7)
    with torch.no_grad():
        only = guided_velocity(dit, positive, negative, 1.0, plan)(latents, sigma)
        assert len(calls) == 1
        guided = guided_velocity(dit, positive, negative, 4.0, plan)(latents, sigma)
        assert len(calls) == 3
        other = guided_velocity(dit, negative, None, 1.0, plan)(latents, sigma)
    torch.testing.assert_close(guided, other + 4 * (only - other))
    with pytest.raises(ValueError, match="negative"):
        guided_velocity(dit, positive, None, 4.0, plan)


def test_image_to_video_input_is_clean_first_frame_zero_source_and_mask() -> None:
    latents, clean = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    mask = torch.zeros(2, 1, 3, 1, 1)
    mask[:, :, 0] = 1
    inputs = model_input(latents, ImageConditioning(clean=clean, mask=mask), CONFIG)
    assert torch.equal(inputs[:, :4, 0], clean[:, :, 0])
    assert torch.equal(inputs[:, :4, 1:], latents[:, :, 1:])
    assert torch.equal(inputs[:, 4:8], torch.zeros_like(latents))
    assert torch.equal(inputs[:, 8], torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4))


def test_editing_input_has_the_source_in_its_own_channels() -> None:
    latents, source = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 4, 1, 4, 4)
    inputs = model_input(latents, ImageConditioning(source=source, mask=torch.ones(1, 1, 1, 1, 1)), CONFIG)
    assert torch.equal(inputs, torch.cat([latents, source, torch.ones(1, 1, 1, 4, 4)], dim=1))


def test_text_to_video_input_has_zeros() -> None:
    latents = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(model_input(latents, None, CONFIG)[:, 4:], torch.zeros(1, 5, 2, 4, 4))


def test_held_frames_are_exact_after_the_loop() -> None:
    clean, mask = torch.randn(1, 4, 3, 2, 2), torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1, 1)
    held = hold(torch.randn(1, 4, 3, 2, 2), ImageConditioning(clean=clean, mask=mask))
    assert torch.equal(held[:, :, 0], clean[:, :, 0])
    assert not torch.equal(held[:, :, 1], clean[:, :, 1])


def test_first_frame_normalisation_against_its_definition() -> None:
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 12, 6, 8) * torch.linspace(0.5, 2, 12).view(1, 1, -1, 1, 1) + 0.3
    found = normalise_first_frames(latents)
    assert torch.equal(found[:, :, 4:], latents[:, :, 4:])
    reference = latents[:, :, 4:9]
    for frame in range(4):
        x = latents[0, :, frame]
        mean = min(max(reference.mean(), x.mean() - 0.05), x.mean() + 0.10)
        std = min(max(reference.std(), x.std() - 0.10), x.std() + 0.25)
        torch.testing.assert_close(found[0, :, frame], (x - x.mean()) / x.std() * std + mean, atol=1e-5, rtol=1e-5)


def test_first_frame_normalisation_leaves_short_clips_alone() -> None:
    latents = torch.randn(1, 16, 4, 2, 2)
    assert normalise_first_frames(latents) is latents
