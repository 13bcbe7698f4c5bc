"""CrossDiT against diffusers' Kandinsky 5 transformer and the golden values of the facts sheet."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel

from kandinsky5_core.bench.live import live_peak
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import IMAGE_EDITING, IMAGE_LITE, VIDEO_LITE, VIDEO_PRO, DiTConfig, NablaConfig
from kandinsky5_core.dit import layers
from kandinsky5_core.dit.embeddings import timestep_features
from kandinsky5_core.dit.model import DiffusionTransformer, initialise
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.dit.rope import visual_angles
from kandinsky5_core.memory.apply import checkpoint_blocks

TINY = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
)  # fmt: skip


def reference(config: DiTConfig) -> Kandinsky5Transformer3DModel:
    fields = (
        "in_visual_dim", "out_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "patch_size", "model_dim",
        "ff_dim", "num_text_blocks", "num_visual_blocks", "axes_dims", "visual_cond",
    )  # fmt: skip
    return Kandinsky5Transformer3DModel(**{name: getattr(config, name) for name in fields}).eval()


def random_pair(config: DiTConfig, seed: int) -> tuple[Kandinsky5Transformer3DModel, DiffusionTransformer]:
    torch.manual_seed(seed)
    theirs = reference(config)
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    ours = DiffusionTransformer(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def text_of(embeds: torch.Tensor, pooled: torch.Tensor, num_pads: int = 0) -> TextConditioning:
    """With `num_pads` rows of garbage behind, masked."""
    batch, length, dim = embeds.shape
    mask = torch.arange(length + num_pads).expand(batch, -1) < length
    return TextConditioning(
        embeds=torch.cat([embeds, 50 * torch.randn(batch, num_pads, dim)], 1), pooled=pooled, mask=mask
    )


CASES = [
    # visual_cond, batch, (T, H, W), rope scale, padded text tokens, head dim, heads, text blocks, visual blocks
    (True, 1, (3, 4, 6), (1.0, 2.0, 2.0), 0, 16, 2, 1, 2),
    (False, 1, (1, 8, 8), (1.0, 1.0, 1.0), 5, 32, 2, 2, 1),
    (True, 2, (5, 6, 4), (1.0, 3.16, 3.16), 3, 16, 3, 1, 3),
    (False, 2, (1, 4, 10), (1.0, 1.0, 1.0), 0, 64, 1, 1, 1),
    (True, 1, (7, 2, 8), (1.0, 3.16, 3.16), 11, 32, 1, 2, 2),
    (True, 2, (4, 4, 4), (1.0, 2.0, 2.0), 1, 64, 2, 1, 1),
    (False, 1, (2, 6, 6), (1.0, 2.0, 2.0), 4, 16, 4, 2, 2),
    (True, 3, (9, 4, 6), (2.0, 1.5, 1.5), 2, 32, 3, 1, 1),
    (True, 1, (1, 16, 10), (1.0, 1.0, 1.0), 7, 128, 1, 1, 1),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_reference_on_random_weights(case: int) -> None:
    visual_cond, batch, (t, h, w), scale, num_pads, head_dim, heads, num_text, num_visual = CASES[case]
    config = DiTConfig(
        in_visual_dim=16 if case % 2 else 4, out_visual_dim=16 if case % 2 else 4, in_text_dim=24, in_text_dim2=12,
        time_dim=32, model_dim=head_dim * heads, ff_dim=96, num_text_blocks=num_text, num_visual_blocks=num_visual,
        axes_dims=(head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3), visual_cond=visual_cond,
    )  # fmt: skip
    theirs, ours = random_pair(config, seed=100 + case)
    latents = torch.randn(batch, config.input_channels, t, h, w)
    embeds, pooled, timestep = torch.randn(batch, 9, 24), torch.randn(batch, 12), torch.rand(batch) * 1000
    with torch.no_grad():
        expected = theirs(
            hidden_states=latents.permute(0, 2, 3, 4, 1), encoder_hidden_states=embeds, timestep=timestep,
            pooled_projections=pooled, visual_rope_pos=[torch.arange(t), torch.arange(h // 2), torch.arange(w // 2)],
            text_rope_pos=torch.arange(9), scale_factor=scale, return_dict=False,
        )  # fmt: skip
        expected = (expected if torch.is_tensor(expected) else expected[0]).permute(0, 4, 1, 2, 3)
        plan = plan_visual(config, (t, h // 2, w // 2), scale)
        found = ours(latents, timestep, text_of(embeds, pooled, num_pads), plan)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert expected.std() > 1e-3


def test_golden_output() -> None:
    model = DiffusionTransformer(TINY).eval()
    weights = model.state_dict()
    assert len(weights) == 80
    for index, key in enumerate(sorted(weights)):
        values = 0.1 * torch.sin(0.7 * index + 0.013 * torch.arange(weights[key].numel(), dtype=torch.float64))
        weights[key] = (values + key.endswith("norm.weight")).float().view(weights[key].shape)
    model.load_state_dict(weights)
    ramp = torch.arange(3 * 4 * 6 * 9, dtype=torch.float64)
    latents = torch.sin(0.1 * ramp).float().view(1, 3, 4, 6, 9).permute(0, 4, 1, 2, 3)
    text = text_of(
        torch.cos(0.05 * torch.arange(40, dtype=torch.float64)).float().view(1, 5, 8),
        torch.sin(0.2 * torch.arange(6, dtype=torch.float64)).float().view(1, 6),
    )
    with torch.no_grad():
        found = model(latents, torch.tensor([500.0]), text, plan_visual(TINY, (3, 2, 3), (1.0, 2.0, 2.0)))
    found = found.permute(0, 2, 3, 4, 1)
    assert math.isclose(found.mean(), 0.102385, abs_tol=2e-6)
    assert math.isclose(found.std(), 0.107616, abs_tol=2e-6)
    first = [0.054238, 0.153058, 0.134077, 0.039842, 0.078376, 0.164571, 0.108114, 0.033333]
    torch.testing.assert_close(found.flatten()[:8], torch.tensor(first), atol=5e-6, rtol=0)
    last = torch.tensor([0.133216, 0.139665, 0.058436, 0.067717])
    torch.testing.assert_close(found[0, 2, 3, 5], last, atol=5e-6, rtol=0)


def test_golden_time_features_and_rope_angles() -> None:
    features = timestep_features(torch.tensor([500.0]), 8)[0]
    expected = [-0.883849, 0.964965, 0.283662, 0.877583, -0.467772, -0.262379, -0.958924, 0.479426]
    torch.testing.assert_close(features, torch.tensor(expected), atol=2e-5, rtol=0)
    angles = visual_angles((1, 2, 2), (4, 4, 4), (1.0, 2.0, 2.0))[3]
    torch.testing.assert_close(angles, torch.tensor([0, 0, 0.5, 0.005, 0.5, 0.005]))


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters"),
    [
        (VIDEO_LITE, 814, 2_007_702_848), (IMAGE_LITE, 1246, 6_022_080_576), (IMAGE_EDITING, 1246, 6_022_254_656),
        (VIDEO_PRO, 1514, 19_311_325_248),
    ],
)  # fmt: skip
def test_released_sizes_have_the_released_tensors(config: DiTConfig, num_tensors: int, num_parameters: int) -> None:
    with torch.device("meta"):
        ours, theirs = DiffusionTransformer(config).state_dict(), reference(config).state_dict()
    assert len(ours) == num_tensors
    assert sum(tensor.numel() for tensor in ours.values()) == num_parameters
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_padding_of_the_text_changes_nothing() -> None:
    _, model = random_pair(TINY, seed=1)
    latents, embeds, pooled = torch.randn(2, 9, 3, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 6)
    plan, timestep = plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0)), torch.tensor([900.0, 20.0])
    padded = text_of(embeds, pooled, num_pads=6)
    with torch.no_grad():
        plain = model(latents, timestep, text_of(embeds, pooled), plan)
        torch.testing.assert_close(model(latents, timestep, padded, plan), plain, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(latents, timestep, padded.trimmed(), plan), plain)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    _, model = random_pair(TINY, seed=2)
    latents, embeds, pooled = torch.randn(2, 9, 3, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 6)
    plan, timestep = plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0)), torch.tensor([900.0, 20.0])
    with torch.no_grad():
        both = model(latents, timestep, text_of(embeds, pooled), plan)
        for row in range(2):
            one = slice(row, row + 1)
            alone = model(latents[one], timestep[one], text_of(embeds[one], pooled[one]), plan)
            torch.testing.assert_close(both[one], alone, atol=1e-5, rtol=1e-4)


def test_bf16_keeps_time_modulation_norms_and_gates_in_fp32() -> None:
    config = DiTConfig(
        in_text_dim=24, in_text_dim2=12, time_dim=64, model_dim=128, ff_dim=256, num_text_blocks=1,
        num_visual_blocks=3, axes_dims=(8, 12, 12),
    )  # fmt: skip
    torch.manual_seed(3)
    model = DiffusionTransformer(config).eval()
    half = DiffusionTransformer(config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    seen = []
    block = half.visual_transformer_blocks[0]
    block.visual_modulation.register_forward_hook(lambda *args: seen.extend(part.dtype for part in args[2]))
    latents, embeds, pooled = torch.randn(1, 33, 3, 8, 8), torch.randn(1, 7, 24), torch.randn(1, 12)
    plan, timestep = plan_visual(config, (3, 4, 4), (1.0, 1.0, 1.0)), torch.tensor([987.2])
    with torch.no_grad():
        exact = model(latents, timestep, text_of(embeds, pooled), plan)
        text = text_of(embeds, pooled).to("cpu", torch.bfloat16)
        found = half(latents.bfloat16(), timestep, text, plan)
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 0.04


def test_gradient_checkpointing_from_outside_changes_no_gradient() -> None:
    _, model = random_pair(TINY, seed=4)
    latents, embeds, pooled = torch.randn(1, 9, 3, 4, 4), torch.randn(1, 5, 8), torch.randn(1, 6)
    plan, timestep = plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0)), torch.tensor([300.0])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(latents, timestep, text_of(embeds, pooled), plan).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    checkpoint_blocks(model)
    again = gradients()
    assert len(plain) == len(again) > 70
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nabla", [None, NablaConfig(mass=0.6, window=(1, 1, 1))])
def test_tokens_in_pieces_give_the_same_bits_with_less_memory(
    dtype: torch.dtype, nabla: NablaConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    ours = DiffusionTransformer(TINY).to(dtype).eval()
    latents, timestep = torch.randn(2, 9, 3, 32, 32, dtype=dtype), torch.tensor([500.0, 20.0])
    text = text_of(torch.randn(2, 5, 8), torch.randn(2, 6)).to("cpu", dtype)
    plan = plan_visual(TINY, (3, 16, 16), (1.0, 2.0, 2.0), nabla)
    if plan.nabla is not None:
        plan.nabla.path = "gather"  # compiled kernels do not let their tensors be counted
    found, peaks = [], []
    for piece in (2**30, 100 * TINY.model_dim):
        monkeypatch.setattr(layers, "PIECE_NUMBERS_CPU", piece)
        monkeypatch.setattr(layers, "MATMUL_PIECE", piece)
        with torch.no_grad():
            peaks.append(live_peak(lambda: found.append(ours(latents, timestep, text, plan))))
    assert torch.equal(found[0], found[1])
    # Of so few tokens NABLA's gathered blocks take the most.
    assert peaks[1] < (0.8 if nabla is None else 1.0) * peaks[0]
    # With gradients all goes whole, and nothing is written over.
    assert torch.allclose(ours(latents, timestep, text, plan), found[0], atol=1e-6 if dtype == torch.float32 else 0.02)


def test_weights_that_are_cast_at_every_call_are_cast_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class CastingLinear(torch.nn.Linear):
        """As ComfyUI's layers are, where it keeps weights in another dtype or place."""

        casts = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.casts += 1
            return torch.nn.functional.linear(x, self.weight.to(x))

    monkeypatch.setattr(layers, "MATMUL_PIECE", 4 * 8)
    ops = SimpleNamespace(Linear=CastingLinear)
    x = torch.randn(1, 12, 8)
    for dtype, casts in ((torch.float32, 3), (torch.float64, 1)):
        feed_forward = layers.FeedForward(8, 16, ops=ops).to(dtype)
        with torch.no_grad():
            found, wanted = feed_forward(x), feed_forward.whole(x)
        assert feed_forward.in_layer.casts == casts + 1
        assert torch.equal(found, wanted)


def test_nabla_with_all_the_mass_is_dense_attention() -> None:
    _, model = random_pair(TINY, seed=5)
    latents, embeds, pooled = torch.randn(1, 9, 3, 20, 36), torch.randn(1, 5, 8), torch.randn(1, 6)
    timestep, grid, scale = torch.tensor([700.0]), (3, 10, 18), (1.0, 2.0, 2.0)
    with torch.no_grad():
        dense = model(latents, timestep, text_of(embeds, pooled), plan_visual(TINY, grid, scale))
        every = plan_visual(TINY, grid, scale, NablaConfig(mass=1.0))
        sparse = model(latents, timestep, text_of(embeds, pooled), every)
    torch.testing.assert_close(sparse, dense, atol=2e-4, rtol=1e-3)


def test_initial_weights_predict_nothing_and_train() -> None:
    model = DiffusionTransformer(TINY)
    initialise(model, torch.Generator().manual_seed(0))
    latents = torch.randn(1, 9, 3, 4, 4)
    plan = plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0))
    found = model(latents, torch.tensor([500.0]), text_of(torch.randn(1, 5, 8), torch.randn(1, 6)), plan)
    assert torch.equal(found, torch.zeros_like(found))
    (found - 1).square().mean().backward()
    assert model.out_layer.out_layer.bias.grad.abs().sum() > 0


def test_unknown_config_keys_are_refused_with_the_nearest_name() -> None:
    from kandinsky5_core.config import config_from_dict

    with pytest.raises(ValueError, match="did you mean 'model_dim'"):
        config_from_dict(DiTConfig, {"modeldim": 32})
