"""The training loop: exact resume, stop, schedule, objective."""

import json
from pathlib import Path

import pytest
import torch

from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer, initialise
from train.checkpoint import list_checkpoints
from train.config import FitConfig
from train.loop import Objective, Stopped, fit
from train.objectives.flow_matching import Batch, FlowMatching, hold_first, sample_sigmas
from train.optim import learning_rate

CONFIG = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
)  # fmt: skip


def batches(step: int, generator: torch.Generator) -> Batch:
    latents = torch.randn(3, 4, 2, 4, 4, generator=generator)
    return Batch(
        latents=latents,
        text=TextConditioning(
            embeds=torch.randn(3, 5, 8, generator=generator), pooled=torch.randn(3, 6, generator=generator),
            mask=torch.ones(3, 5, dtype=torch.bool),
        ),
        image=hold_first(latents, torch.tensor([True, False, False])),
    )  # fmt: skip


def make() -> DiffusionTransformer:
    model = DiffusionTransformer(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    return model


OBJECTIVE = FlowMatching(batches, (1.0, 1.0, 1.0))


def stopping_after(num_steps: int, folder: Path) -> Objective:
    """The objective, and a STOP file in the step that shall be the last."""

    def objective(model: DiffusionTransformer, step: int, generator: torch.Generator) -> dict:
        if step == num_steps - 1:
            (folder / "STOP").touch()
        return OBJECTIVE(model, step, generator)

    return objective


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_resume_is_bitwise_equal_to_never_stopping(tmp_path: Path, optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = FitConfig(num_steps=9, learning_rate=1e-2, warmup_steps=2, checkpoint_every=100, optimizer=optimizer)
    straight = make()
    average = fit(straight, OBJECTIVE, config, tmp_path / "straight").state_dict()
    for stop_at in (3, 7):
        folder = tmp_path / f"stopped-{stop_at}"

        with pytest.raises(Stopped, match=f"after step {stop_at}, saved"):
            fit(make(), stopping_after(stop_at, folder), config, folder)
        (folder / "STOP").unlink()
        resumed = make()
        again = fit(resumed, OBJECTIVE, config, folder).state_dict()
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
        assert all(torch.equal(average[name], again[name]) for name in average)


def test_the_loss_falls(tmp_path: Path) -> None:
    def same(model: DiffusionTransformer, step: int, generator: torch.Generator) -> dict:
        return OBJECTIVE(model, 0, torch.Generator().manual_seed(5))

    config = FitConfig(num_steps=60, learning_rate=5e-3, warmup_steps=5, optimizer="muon")
    fit(make(), same, config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    def broken(model: DiffusionTransformer, step: int, generator: torch.Generator) -> dict:
        losses = OBJECTIVE(model, step, generator)
        return {"loss": losses["loss"] * (float("nan") if step == 4 else 1)}

    with pytest.raises(RuntimeError, match="not finite at step 5"):
        fit(make(), broken, FitConfig(num_steps=9, learning_rate=1e-3, checkpoint_every=2), tmp_path)
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_given_frame_is_clean_in_the_input_and_out_of_the_loss() -> None:
    seen = {}

    class Spy(DiffusionTransformer):
        def forward(self, latents, timestep, text, plan):
            seen["inputs"], seen["timestep"] = latents, timestep
            return torch.zeros_like(latents[:, :4])

    clean = torch.randn(1, 4, 2, 4, 4)
    batch = batches(0, torch.Generator().manual_seed(1))
    text = TextConditioning(embeds=batch.text.embeds[:1], pooled=batch.text.pooled[:1], mask=batch.text.mask[:1])
    held = Batch(latents=clean, text=text, image=hold_first(clean, torch.tensor([True])))
    loss = FlowMatching(lambda step, generator: held, (1.0, 1.0, 1.0))(Spy(CONFIG), 0, torch.Generator().manual_seed(3))
    inputs, sigma = seen["inputs"], float(seen["timestep"]) / 1000
    assert torch.equal(inputs[:, :4, 0], clean[:, :, 0])
    assert torch.equal(inputs[:, 4:8], torch.zeros(1, 4, 2, 4, 4))
    assert torch.equal(inputs[0, 8, :, 0, 0], torch.tensor([1.0, 0.0]))
    noise = (inputs[:, :4, 1] - (1 - sigma) * clean[:, :, 1]) / sigma
    torch.testing.assert_close(loss["loss"], (noise - clean[:, :, 1]).square().mean(), rtol=1e-3, atol=1e-3)


def test_sigma_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = sample_sigmas(20_000, "uniform", 1.0, generator)
    shifted = sample_sigmas(20_000, "uniform", 3.0, generator)
    assert abs(float(uniform.mean()) - 0.5) < 0.01
    assert abs(float(shifted.median()) - 0.75) < 0.01
    normal = sample_sigmas(20_000, "logit_normal", 1.0, generator)
    assert abs(float(torch.logit(normal).std()) - 1) < 0.03
    with pytest.raises(ValueError, match="logit_normal"):
        sample_sigmas(1, "normal", 1.0, generator)


def test_learning_rate_warms_up_and_falls() -> None:
    config = FitConfig(num_steps=100, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) > 0.95
    assert rates[-1] < 0.11
