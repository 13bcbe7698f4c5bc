"""Masks: checks, growing, feathering, latent cells, compositing."""

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


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 24))
def test_growing_is_by_a_round_brush(pixels):
    mask = spot()
    distance = distance_to(mask)
    grown = grow(mask, pixels)[0]
    assert bool((grown[distance <= pixels - 1] == 1).all())
    assert bool((grown[distance > pixels] == 0).all())


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


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(32, 48), "mask is 48x32 and the picture 64x64"),
        (torch.ones(3, 64, 64), "3 frames; give one for all, or 9"),
        (torch.zeros(64, 64), "empty"),
        (torch.full((64, 64), 255.0), "outside 0 to 1"),
        (torch.full((64, 64), float("nan")), "outside 0 to 1"),
    ],
)
def test_bad_masks_name_the_fault_and_the_fix(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, (64, 64), 9)


def test_good_masks_pass():
    assert check_mask(torch.ones(64, 64), (64, 64), 9).shape == (1, 64, 64)
    assert check_mask(torch.ones(9, 64, 64), (64, 64), 9).shape == (9, 64, 64)
