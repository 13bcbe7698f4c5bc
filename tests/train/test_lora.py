"""LoRA training: only the pairs move, their file loads everywhere, and it does what the trained model did."""

from pathlib import Path

import pytest
import torch

from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.memory.apply import checkpoint_blocks
from kandinsky5_core.weights import lora_tools
from kandinsky5_core.weights.lora import read_lora
from tests.train.test_loop import CONFIG, OBJECTIVE, batches, make
from train.config import FitConfig, LoraConfig
from train.loop import fit
from train.objectives.strengths import AtStrengths
from train.trainable import WithLora, lora_tensors

LORA = LoraConfig(rank=4, alpha=8.0)


def velocity(model: torch.nn.Module) -> torch.Tensor:
    batch = batches(3, torch.Generator().manual_seed(3))
    plan = plan_visual(CONFIG, (2, 2, 2), (1.0, 1.0, 1.0))
    inputs = torch.cat([batch.latents, torch.zeros_like(batch.latents), torch.zeros_like(batch.latents[:, :1])], 1)
    with torch.no_grad():
        return model(inputs, torch.tensor([300.0, 500.0, 700.0]), batch.text, plan)


def randomised() -> torch.nn.Module:
    model = make()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def test_a_new_lora_changes_nothing_and_detaching_restores() -> None:
    base = randomised()
    before = velocity(base)
    adapted = WithLora(base, LORA, torch.Generator().manual_seed(0))
    assert torch.equal(velocity(adapted), before)
    assert len(adapted.pairs) == 10 + 6  # one visual block, and a text block without cross-attention
    for parameter in adapted.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    assert not torch.equal(velocity(adapted), before)
    assert torch.equal(velocity(adapted.detach()), before)


def test_training_moves_the_pairs_alone_and_the_file_gives_the_same_model(tmp_path: Path) -> None:
    base = randomised()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = WithLora(base, LORA, torch.Generator().manual_seed(0))
    config = FitConfig(num_steps=12, learning_rate=1e-2, warmup_steps=1, ema_decay=0.5, checkpoint_every=5)
    fit(adapted, OBJECTIVE, config, tmp_path / "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert all(bool(pair.lora_B.detach().any()) for pair in adapted.pairs.values())
    tensors = lora_tensors(adapted.state_dict())
    trained = velocity(adapted)
    adapted.detach()
    shapes = {name.removesuffix(".weight"): tuple(t.shape) for name, t in weights.items() if name.endswith(".weight")}
    for layout in lora_tools.FORMATS:
        path = tmp_path / f"{layout}.safetensors"
        lora_tools.write_lora(path, tensors, layout, {"lora_alpha": "8"})
        for module, pair in lora_tools.lora_deltas(read_lora(path, shapes)).items():
            base.get_submodule(module).weight.data = weights[f"{module}.weight"] + lora_tools.delta(*pair)
        torch.testing.assert_close(velocity(base), trained, atol=2e-3, rtol=2e-3)


def test_interrupted_lora_training_is_bitwise_the_same(tmp_path: Path) -> None:
    config = FitConfig(num_steps=8, learning_rate=1e-2, warmup_steps=1, checkpoint_every=2)

    def run(folder: Path, stop_at: int | None) -> dict[str, torch.Tensor]:
        adapted = WithLora(randomised(), LoraConfig(rank=2, alpha=2.0), torch.Generator().manual_seed(5))

        def objective(model, step, generator):
            if step == stop_at:
                raise KeyboardInterrupt
            return OBJECTIVE(model, step, generator)

        fit(adapted, objective, config, folder)
        return adapted.state_dict()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", None)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="no linear layer of the model ends with nothing"):
        WithLora(make(), LoraConfig(targets=("nothing",)))
    assert LoraConfig(rank=16, alpha=8, rank_stabilised=True).scale == 2.0


def _moved(least: float = 1.0, scale: float = 1.0, base: torch.nn.Module | None = None) -> WithLora:
    config = LoraConfig(rank=4, alpha=8.0, least_strength=least)
    adapted = WithLora(base or randomised(), config, torch.Generator().manual_seed(0))
    for pair in adapted.pairs.values():
        pair.lora_B.data = scale * torch.randn(pair.lora_B.shape, generator=torch.Generator().manual_seed(4)) * 0.1
    return adapted


def test_a_weakened_lora_trains_as_one_with_smaller_matrices_and_samples_whole() -> None:
    adapted, whole, weak = _moved(), velocity(_moved()), velocity(_moved(scale=0.6))
    adapted.strength = 0.6
    torch.testing.assert_close(velocity(adapted.train()), weak)
    assert torch.equal(velocity(adapted.eval()), whole)
    assert not torch.allclose(weak, whole)


def test_strengths_are_drawn_anew_each_step_within_their_range() -> None:
    adapted, drawn = _moved().train(), []
    objective = AtStrengths(OBJECTIVE, 0.4)
    for index in range(40):
        weakened = objective(adapted, index, torch.Generator().manual_seed(index))["loss"]
        drawn.append(adapted.strength)
        again = objective(adapted, index, torch.Generator().manual_seed(index))["loss"]
        assert torch.equal(weakened, again) and adapted.strength == drawn[-1]
    assert 0.4 <= min(drawn) < 0.5 and 0.9 < max(drawn) <= 1
    with pytest.raises(ValueError, match="for a LoRA: where all weights move there is no strength"):
        objective(randomised(), 0, torch.Generator())
    with pytest.raises(ValueError, match="least_strength must be above 0 and at most 1, got 0"):
        LoraConfig(least_strength=0)


def test_the_backward_pass_recomputes_at_the_strength_of_its_step() -> None:
    gradients = []
    for checkpointed in (False, True):
        base = randomised()
        if checkpointed:
            checkpoint_blocks(base)
        adapted = _moved(base=base).train()
        AtStrengths(OBJECTIVE, 0.3)(adapted, 0, torch.Generator().manual_seed(5))["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in adapted.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))
