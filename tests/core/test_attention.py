"""Dense attention: the formula and key masks."""

import pytest
import torch

from kandinsky5_core.attention.dense import dense_attention


def softmax_attention(q, k, v, keep):
    scores = (q.double() @ k.double().mT) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), dim=-1) @ v.double()


@pytest.mark.parametrize("seed", range(3))
def test_dense_attention_is_softmax_of_scaled_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, 7, 16, generator=generator)
    k, v = torch.randn(2, 2, 3, 11, 16, generator=generator)
    key_mask = torch.rand(2, 11, generator=generator) < 0.6
    key_mask[:, 0] = True
    unmasked = softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool))
    masked = softmax_attention(q, k, v, key_mask[:, None, None])
    torch.testing.assert_close(dense_attention(q, k, v).double(), unmasked, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dense_attention(q, k, v, key_mask).double(), masked, atol=1e-6, rtol=1e-5)
    assert (masked - unmasked).abs().max() > 0.01


def test_masked_keys_do_not_matter():
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    key_mask = torch.tensor([[True, True, True, True, False, False]])
    expected = dense_attention(q, k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(dense_attention(q, k, v, key_mask), expected)
