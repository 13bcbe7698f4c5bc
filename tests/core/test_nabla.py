"""NABLA: token order, block mask and both execution paths against slow, literal readings of the rule."""

import logging
import math
import os
import shutil

import pytest
import torch

from kandinsky5_core.attention import block_mask, flex, gather
from kandinsky5_core.attention.block_mask import kept_blocks, mass_mask, window_mask
from kandinsky5_core.attention.dense import dense_attention
from kandinsky5_core.attention.gather import gathered_attention
from kandinsky5_core.attention.nabla import NablaAttention, resolve_attention
from kandinsky5_core.attention.token_blocks import token_blocks
from kandinsky5_core.config import NablaConfig

# Compiling FlexAttention takes seconds, so tests that are not about it take the gather path.
SMALL_WINDOW = (1, 1, 1)


def random_qkv(seed, *shape, spread=1.2):
    """Random tokens whose blocks each have a direction of their own, so that the pooled map is far from flat.

    The logits of the pooled map have a standard deviation of about spread^2.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator)
    directions = spread * torch.randn(2, *shape[:2], shape[2] // 64, shape[3], generator=generator)
    q_blocks, k_blocks = directions.repeat_interleave(64, dim=-2)
    return q + q_blocks, k + k_blocks, v


def expand_mask(mask, token_mask=None):
    tokens = mask.repeat_interleave(64, -1).repeat_interleave(64, -2)
    return tokens if token_mask is None else tokens & token_mask


def brute_force(q, k, v, mask, token_mask=None):
    """Softmax attention in float64 with the whole tokens x tokens mask."""
    scores = (q.double() @ k.double().mT) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~expand_mask(mask, token_mask), -torch.inf).softmax(-1) @ v.double()


def literal_mass_mask(q, k, mass, token_mask=None):
    """The rule of the report, one row at a time, in Python floats."""
    batch, heads, tokens, dim = q.shape
    n = tokens // 64
    real = [True] * tokens if token_mask is None else token_mask.tolist()
    mask = torch.zeros(batch, heads, n, n, dtype=torch.bool)

    def means(x):
        rows = [[x[i] for i in range(block * 64, block * 64 + 64) if real[i]] for block in range(n)]
        return [torch.stack(row).double().mean(0) for row in rows]

    for b in range(batch):
        for head in range(heads):
            q_means, k_means = means(q[b, head]), means(k[b, head])
            for i in range(n):
                scores = [float(q_means[i] @ k_mean) / math.sqrt(dim) for k_mean in k_means]
                weights = [math.exp(score - max(scores)) for score in scores]
                total = 0.0
                for j in sorted(range(n), key=lambda j: weights[j]):
                    total += weights[j] / sum(weights)
                    mask[b, head, i, j] = total >= 1 - mass
    return mask


def literal_window(blocks, window):
    cells = [(t, i, j) for t in range(blocks[0]) for i in range(blocks[1]) for j in range(blocks[2])]
    near = [[all(abs(a - b) <= w // 2 for a, b, w in zip(x, y, window, strict=True)) for y in cells] for x in cells]
    return torch.tensor(near)


# --- token order


def test_block_order_golden_ids():
    order = token_blocks((2, 16, 24)).order
    assert order[:8].tolist() == list(range(8))
    assert [int(order[place]) for place in (8, 64, 192)] == [24, 8, 192]
    assert sorted(order.tolist()) == list(range(2 * 16 * 24))


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 16, 24), (2, 5, 11), (1, 40, 88), (4, 1, 9)])
def test_restore_undoes_reorder_along_any_axis(grid):
    tokens = math.prod(grid)
    plan = NablaAttention(NablaConfig(mass=0.9), grid)
    x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan.restore(plan.reorder(x)), x)
    table = torch.arange(tokens * 4.0).view(tokens, 4)
    assert torch.equal(plan.reorder(table, dim=0), plan.reorder(table[None])[0])
    assert torch.equal(plan.restore(plan.reorder(table, dim=0), dim=0), table)
    assert plan.reorder(x).is_contiguous()


def test_padding_is_marked_and_stays_within_its_block():
    grid = (2, 5, 11)
    blocks = token_blocks(grid)
    assert blocks.blocks == (2, 1, 2) and len(blocks.order) == 4 * 64
    assert int(blocks.token_mask.sum()) == math.prod(grid)
    assert sorted(blocks.order[blocks.token_mask].tolist()) == list(range(math.prod(grid)))
    assert bool(blocks.token_mask.view(-1, 64).any(1).all())
    block_of_token = torch.empty(math.prod(grid), dtype=torch.long)
    block_of_token[blocks.order[blocks.token_mask]] = blocks.token_mask.nonzero().squeeze(1) // 64
    assert torch.equal(block_of_token[blocks.order], torch.arange(256) // 64)
    assert token_blocks((2, 8, 16)).token_mask is None


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="empty"):
        token_blocks((1, 0, 8))


# --- window

DENSITIES = {
    (61, 4, 4): 0.0673, (61, 4, 6): 0.0479, (31, 6, 10): 0.0403, (61, 6, 10): 0.0214,
    (31, 8, 8): 0.0382, (31, 5, 11): 0.0431, (31, 7, 9): 0.0387,
}  # fmt: skip


@pytest.mark.parametrize(("blocks", "density"), DENSITIES.items())
def test_window_density_of_the_released_sizes(blocks, density):
    mask = window_mask(blocks, (11, 3, 3))
    assert float(mask.float().mean()) == pytest.approx(density, abs=5e-5)
    counts = mask.sum(-1)
    assert (int(counts.min()), int(counts.max()), int(counts[0])) == (24, 99, 24)


@pytest.mark.parametrize(
    ("blocks", "window"), [((7, 3, 4), (5, 3, 1)), ((4, 5, 2), (3, 1, 3)), ((1, 1, 1), (11, 3, 3))]
)
def test_window_equals_the_literal_reading(blocks, window):
    assert torch.equal(window_mask(blocks, window), literal_window(blocks, window))


# --- mass


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mass", [0.3, 0.7, 0.9])
def test_mass_mask_equals_the_literal_reading(seed, mass):
    q, k, _ = random_qkv(seed, 2, 3, 12 * 64, 16, spread=0.6 + 0.3 * seed)
    mask = mass_mask(q, k, mass)
    assert torch.equal(mask, literal_mass_mask(q, k, mass))
    assert 0.05 < mask.float().mean() < 0.95
    assert not torch.equal(mask[0, 0], mask[0, 1]) and not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("seed", range(2))
def test_mass_mask_pools_real_tokens_only(seed):
    blocks = token_blocks((3, 9, 13))
    q, k, _ = random_qkv(seed, 2, 2, len(blocks.order), 16)
    mask = mass_mask(q, k, 0.8, blocks.token_mask)
    assert torch.equal(mask, literal_mass_mask(q, k, 0.8, blocks.token_mask))
    q[:, :, ~blocks.token_mask] = 1e4
    k[:, :, ~blocks.token_mask] = -1e4
    assert torch.equal(mask, mass_mask(q, k, 0.8, blocks.token_mask))


def test_mass_one_keeps_everything_and_a_tiny_mass_keeps_one():
    q, k, _ = random_qkv(0, 1, 2, 20 * 64, 16, spread=5.0)
    assert bool(mass_mask(q, k, 1.0).all())
    assert bool((mass_mask(q, k, 1e-12).sum(-1) == 1).all())


def test_equal_probabilities_are_dropped_in_order_of_their_index():
    zeros = torch.zeros(1, 1, 8 * 64, 4)
    expected = torch.tensor([False, False, False, True, True, True, True, True])
    assert torch.equal(mass_mask(zeros, zeros, 0.5)[0, 0], expected.expand(8, 8))


def test_mask_does_not_depend_on_the_group_size(monkeypatch):
    q, k, _ = random_qkv(1, 2, 3, 8 * 64, 16)
    whole = mass_mask(q, k, 0.7)
    lists = kept_blocks(whole)
    monkeypatch.setattr("kandinsky5_core.attention.block_mask.MAX_SCORES", 130)
    assert torch.equal(mass_mask(q, k, 0.7), whole)
    assert all(torch.equal(a, b) for a, b in zip(kept_blocks(whole), lists, strict=True))


def test_kept_blocks_lists_the_mask():
    mask = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    counts, indices = kept_blocks(mask)
    for b, head, row in [(0, 0, 0), (1, 2, 8), (0, 1, 4)]:
        assert indices[b, head, row, : counts[b, head, row]].tolist() == mask[b, head, row].nonzero()[:, 0].tolist()
        assert sorted(indices[b, head, row].tolist()) == list(range(9))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lists_made_by_counting_are_those_made_by_sorting(share):
    """The first are taken on accelerators, the second on the CPU."""
    mask = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(0)) < share
    by_rank = block_mask.listed_by_rank(mask)
    assert by_rank.dtype == torch.int32 and torch.equal(by_rank, block_mask.listed_by_sorting(mask))


# --- attention


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 3)])
def test_block_mask_is_mass_or_window(window):
    plan = NablaAttention(NablaConfig(mass=0.4, window=window), (3, 16, 16), path="gather")
    q, k, _ = random_qkv(0, 2, 2, 768, 16)
    by_mass, near = literal_mass_mask(q, k, 0.4), literal_window((3, 2, 2), window)
    assert torch.equal(plan.block_mask(q, k), by_mass | near)
    assert bool((near & ~by_mass).any()) and bool((by_mass & ~near).any())


GRIDS = [(3, 16, 16), (3, 9, 20), (2, 5, 11)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("budget", [1, 2**20])
def test_gather_path_equals_brute_force(grid, budget, monkeypatch):
    monkeypatch.setattr(gather, "GATHERED_NUMBERS_CPU", budget)
    plan = NablaAttention(NablaConfig(mass=0.6, window=SMALL_WINDOW), grid, path="gather")
    q, k, v = random_qkv(5, 2, 3, len(plan.tokens.order), 16)
    mask = plan.block_mask(q, k)
    out = plan(q, k, v)
    assert mask.float().mean() < 0.9
    torch.testing.assert_close(out.double(), brute_force(q, k, v, mask, plan.token_mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_mass_one_equals_dense_attention(grid):
    plan = NablaAttention(NablaConfig(mass=1.0), grid, path="gather")
    q, k, v = torch.randn(3, 2, 3, math.prod(grid), 16, generator=torch.Generator().manual_seed(2))
    out = plan.restore(plan(*(plan.reorder(x, dim=2) for x in (q, k, v))), dim=2)
    torch.testing.assert_close(out, dense_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_gradients_equal_brute_force(grid, monkeypatch):
    monkeypatch.setattr(gather, "GATHERED_NUMBERS_CPU", 2**15)
    plan = NablaAttention(NablaConfig(mass=0.6, window=SMALL_WINDOW), grid)
    inputs = [x.requires_grad_() for x in random_qkv(7, 2, 2, len(plan.tokens.order), 16)]
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    if plan.token_mask is not None:
        weights = weights * plan.token_mask[:, None]
    exact = brute_force(*inputs, plan.block_mask(*inputs[:2]), plan.token_mask)
    expected = torch.autograd.grad((exact * weights).sum(), inputs)
    actual = torch.autograd.grad((plan(*inputs) * weights).sum(), inputs)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler to compile with")
def test_compiled_flex_equals_gather_and_brute_force(caplog):
    caplog.set_level(logging.INFO)
    for grid, batch, heads in [((3, 16, 16), 2, 3), ((5, 16, 24), 1, 2)]:
        plan = NablaAttention(NablaConfig(mass=0.6, window=SMALL_WINDOW), grid)
        # Attention layers hand over (B, S, heads, d) seen as (B, heads, S, d).
        q, k, v = (
            x.transpose(1, 2).contiguous().transpose(1, 2)
            for x in random_qkv(3, batch, heads, len(plan.tokens.order), 16)
        )
        mask = plan.block_mask(q, k)
        with torch.no_grad():
            out = plan(q, k, v)
            plan(q, k, v)
        assert mask.float().mean() < 0.9
        torch.testing.assert_close(out, gathered_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.double(), brute_force(q, k, v, mask), atol=1e-5, rtol=1e-5)
    # Said once for each plan, though each was called twice.
    messages = [record.message for record in caplog.records if record.name.startswith("kandinsky5_core")]
    assert messages == ["NABLA without gradients on cpu: compiled FlexAttention"] * 2


def test_without_a_compiler_it_says_so_once_and_stays_exact(caplog, monkeypatch):
    def no_compiler(device_type):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler found")

        return fail

    monkeypatch.setattr(flex, "_compiled_flex", no_compiler)
    plan = NablaAttention(NablaConfig(mass=0.6, window=SMALL_WINDOW), (2, 16, 16))
    q, k, v = random_qkv(0, 1, 2, 512, 16)
    out = plan(q, k, v)
    assert torch.equal(plan(q, k, v), out)
    torch.testing.assert_close(out.double(), brute_force(q, k, v, plan.block_mask(q, k)), atol=1e-5, rtol=1e-5)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "gathered token blocks" in warnings[0].message and "no C++ compiler found" in warnings[0].message
    with pytest.raises(ValueError, match="path 'flex' cannot be used: RuntimeError: no C"):
        NablaAttention(NablaConfig(mass=0.6), (2, 16, 16), path="flex")(q, k, v)


def test_a_flex_that_ignores_the_mask_is_found_out(caplog, monkeypatch):
    def ignores_mask(device_type):
        return lambda q, k, v, block_mask: dense_attention(q, k, v)

    monkeypatch.setattr(flex, "_compiled_flex", ignores_mask)
    plan = NablaAttention(NablaConfig(mass=0.6, window=SMALL_WINDOW), (2, 16, 16))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        q, k, v = (x.to(dtype) for x in random_qkv(0, 1, 2, 512, 16))
        expected = brute_force(q, k, v, plan.block_mask(q, k))
        torch.testing.assert_close(plan(q, k, v).double(), expected, atol=tolerance, rtol=tolerance)
    assert "block mask is ignored" in caplog.text


@pytest.mark.parametrize(
    ("grid", "wants_grad", "reason"), [((2, 16, 16), True, "backward"), ((2, 9, 16), False, "padded")]
)
def test_known_limits_of_flex_on_cpu_are_named(grid, wants_grad, reason, caplog):
    caplog.set_level(logging.INFO)
    config = NablaConfig(mass=0.6)
    q, k, v = random_qkv(0, 1, 1, len(token_blocks(grid).order), 16)
    q.requires_grad_(wants_grad)
    NablaAttention(config, grid)(q, k, v)
    assert [record.levelno for record in caplog.records] == [logging.INFO] and reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        NablaAttention(config, grid, path="flex")(q, k, v)


def test_wrong_calls_are_refused():
    plan = NablaAttention(NablaConfig(mass=0.6), (2, 16, 16), path="gather")
    q, k, v = random_qkv(0, 1, 1, 512, 16)
    with pytest.raises(ValueError, match="key_mask"):
        plan(q, k, v, torch.ones(1, 512, dtype=torch.bool))
    with pytest.raises(ValueError, match="512 tokens"):
        plan(q[:, :, :256], k[:, :, :256], v[:, :, :256])
    with pytest.raises(ValueError, match="got 'fast'"):
        NablaAttention(NablaConfig(mass=0.6), (2, 16, 16), path="fast")


# --- choice


def test_resolve_attention(caplog):
    caplog.set_level(logging.INFO)
    trained = NablaConfig(mass=0.7)
    assert resolve_attention("auto", trained) is trained
    assert resolve_attention("nabla", trained) is trained
    assert resolve_attention("auto", None) is None
    assert resolve_attention("dense", trained) is None
    assert not caplog.records
    assert resolve_attention("nabla", None) == NablaConfig(mass=0.9, window=(11, 3, 3))
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="got 'sparse'"):
        resolve_attention("sparse", None)
