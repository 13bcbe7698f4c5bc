"""Masks: checks, growing, feathering, latent cells, compositing."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5_core.config import FLUX_VAE, HUNYUAN_VAE
from kandinsky5_core.masks import check_mask, composite, feather, grow, latent_mask, outpaint_mask


def spot(size=64, left=20, right=40):
    mask = torch.zeros(1, size, size)
    mask[:, left:right, left:right] = 1
    return mask


def distance_to(mask):
    """Brute force: from every pixel to the nearest masked one."""
    inside = mask[0].nonzero().float()
    every = torch.cartesian_prod(torch.arange(mask.shape[1]), torch.arange(mask.shape[2])).float()
    return torch.cdist(every, inside).amin(1).reshape(mask.shape[1:])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 90))
def test_growing_is_by_a_round_brush(pixels):
    mask = spot()
    assert torch.equal(grow(mask, pixels)[0], (distance_to(mask) <= pixels + 1e-3).float())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_growing_equals_kornia(pixels, height, width, shrinks):
    from kornia.morphology import dilation, erosion

    mask = torch.rand(2, height, width)
    offsets = torch.arange(-pixels, pixels + 1)
    disk = (offsets[:, None] ** 2 + offsets[None] ** 2 <= pixels**2).float()
    expected = (erosion if shrinks else dilation)(mask[:, None], disk)[:, 0]
    assert torch.equal(grow(mask, -pixels if shrinks else pixels), expected)


def test_growing_does_not_change_the_given_mask_and_reaches_beyond_tiny_pictures():
    mask = spot()
    grow(mask, 5), grow(mask, -5)
    assert torch.equal(mask, spot())
    assert torch.equal(grow(torch.full((1, 1, 1), 0.3), 64), torch.full((1, 1, 1), 0.3))
    line = torch.zeros(1, 1, 9)
    line[..., 4] = 1
    assert torch.equal(grow(line.mT, 2).mT, grow(line, 2)) and int(grow(line, 2).sum()) == 5


def test_growing_far_in_a_large_picture_takes_little_memory():
    """Of the largest tensor alone: a brush unfolded into channels would be 12853 times the picture."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    mask = torch.zeros(1, 1024, 1024)
    mask[0, 500, 500] = 1
    with Sizes():
        grown = grow(mask, 64)
    assert int(grown.sum()) == 12853 and largest <= 2 * mask.numel()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9))
def test_shrinking_is_growing_the_rest(pixels):
    mask = spot()
    assert torch.equal(grow(mask, -pixels), 1 - grow(1 - mask, pixels))


def test_grey_masks_keep_their_values_when_grown():
    mask = torch.zeros(1, 32, 32)
    mask[0, 16, 16] = 0.4
    grown = grow(mask, 3)
    torch.testing.assert_close(grown.unique(), torch.tensor([0.0, 0.4]))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 16))
def test_feathering_ends_after_its_radius(pixels):
    mask = spot(96, 30, 66)
    soft = feather(mask, pixels)[0]
    # The kernel is a square of that radius.
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    far = torch.stack([30 - rows, rows - 65, 30 - columns, columns - 65]).amax(0)
    assert bool((soft[far > pixels] == 0).all())
    assert bool((soft[far < -pixels] == 1).all())
    edge = soft[48, 30 - pixels : 30 + pixels]
    assert bool((edge.diff() >= -1e-6).all()) and 0 < float(edge[0]) < 0.5 < float(edge[-1]) < 1


def test_feathering_keeps_flat_grey_bit_by_bit_and_bears_tiny_pictures():
    grey = torch.full((2, 40, 40), 0.3)
    assert torch.equal(feather(grey, 7), grey)
    assert torch.equal(feather(torch.ones(1, 1, 1), 64), torch.ones(1, 1, 1))
    assert torch.equal(feather(spot(), 0), spot())


def test_latent_cells_take_the_largest_value_of_their_pixels_and_frames():
    mask = torch.rand(9, 32, 48)
    cells = latent_mask(mask, HUNYUAN_VAE, 9)
    assert cells.shape == (1, 1, 3, 4, 6)
    for t, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for y in range(4):
            for x in range(6):
                piece = mask[frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                assert cells[0, 0, t, y, x] == piece.max()
    assert latent_mask(mask[:1], FLUX_VAE, 1).shape == (1, 1, 1, 4, 6)
    assert torch.equal(latent_mask(mask[:1], HUNYUAN_VAE, 9)[0, 0, 0], latent_mask(mask[:1], HUNYUAN_VAE, 9)[0, 0, 2])


def test_compositing_keeps_the_base_beside_a_broken_result():
    base, alpha = torch.rand(1, 4, 4, 3), torch.zeros(1, 4, 4)
    generated = torch.full((2, 1, 4, 4, 3), float("nan"))
    assert torch.equal(composite(generated, base, alpha), base.expand(2, -1, -1, -1, -1))


def test_compositing_is_exact_outside_and_inside():
    generated, base = torch.rand(2, 3, 8, 8, 3), torch.rand(3, 8, 8, 3)
    alpha = torch.zeros(1, 8, 8)
    alpha[:, :4], alpha[:, 4] = 1, 0.25
    result = composite(generated, base, alpha)
    assert torch.equal(result[:, :, :4], generated[:, :, :4])
    assert torch.equal(result[:, :, 5:], base[None, :, 5:].expand(2, -1, -1, -1, -1))
    torch.testing.assert_close(result[:, :, 4], 0.75 * base[None, :, 4] + 0.25 * generated[:, :, 4])


def test_outpainting_repaints_new_pixels_and_a_strip_beside_them():
    mask = outpaint_mask(None, (10, 12), (4, 0, 0, 3), 2)
    assert mask.shape == (1, 13, 16)
    assert bool((mask[0, :8, 6:] == 0).all())
    assert bool((mask[0, :, :6] == 1).all()) and bool((mask[0, 8:] == 1).all())
    given = torch.zeros(1, 10, 12)
    given[:, 4, 8] = 0.5
    assert float(outpaint_mask(given, (10, 12), (4, 0, 0, 3), 2)[0, 4, 12]) == 0.5


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.tuples(*[st.integers(0, 3)] * 4), st.integers(0, 15))
def test_outpainting_keeps_only_what_is_far_from_every_new_edge(height, width, outpaint, overlap):
    left, top, right, bottom = outpaint
    mask = outpaint_mask(None, (height, width), outpaint, overlap)[0]
    for y in range(height + top + bottom):
        for x in range(width + left + right):
            inside = (x - left, y - top, left + width - 1 - x, top + height - 1 - y)
            near = [far < (overlap if new else 0) for far, new in zip(inside, outpaint, strict=True)]
            assert mask[y, x] == float(any(near))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(32, 48), "mask is 48x32 and the picture 64x64"),
        (torch.ones(3, 64, 64), "3 frames; give one for all, or 9"),
        (torch.zeros(64, 64), "empty"),
        (torch.full((64, 64), 255.0), "from 255 to 255, outside 0 to 1; divide"),
        (torch.full((64, 64), -0.5), "from -0.5 to -0.5, outside 0 to 1"),
        (torch.full((64, 64), float("nan")), "not finite"),
        (torch.full((64, 64), float("inf")), "not finite"),
        (torch.ones(1, 1, 64, 64), r"shape \(1, 1, 64, 64\); give"),
        (torch.ones(64), r"shape \(64,\); give"),
    ],
)
def test_bad_masks_name_the_fault_and_the_fix(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, (64, 64), 9)


def test_a_full_mask_is_right_and_said(caplog):
    with caplog.at_level(logging.INFO):
        assert torch.equal(check_mask(torch.ones(8, 8, dtype=torch.uint8), (8, 8), 1), torch.ones(1, 8, 8))
    assert "everything is made anew" in caplog.text


def test_good_masks_pass():
    assert check_mask(torch.ones(64, 64), (64, 64), 9).shape == (1, 64, 64)
    assert check_mask(torch.ones(9, 64, 64), (64, 64), 9).shape == (9, 64, 64)
