"""Where a picture lies on the model's frame."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5_core.canvas import check_ratio, check_side, cover, extend_edges, keep, kept_size

SIDES = st.integers(1, 300)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 12), st.integers(1, 12))
def test_every_picture_fits_and_comes_back_at_its_size(height, width, rows, columns):
    frames = torch.rand(1, height, width, 3)
    work = (16 * rows, 16 * columns)
    for place in (cover, keep):
        canvas = place((height, width), work)
        assert canvas.to_work(frames).shape == (1, *work, 3)
        result = canvas.from_work(canvas.to_work(frames))
        assert result.shape == (1, *canvas.result_size, 3)
        assert canvas.result_size == (work if place is cover else (height, width))


@settings(deadline=None)
@given(SIDES, SIDES)
def test_a_kept_picture_is_only_padded_on_a_frame_of_its_size_rounded_up(height, width):
    frames = torch.rand(1, height, width, 3)
    canvas = keep((height, width), (-(-height // 16) * 16, -(-width // 16) * 16))
    work = canvas.to_work(frames)
    assert torch.equal(work[:, :height, :width], frames)
    assert torch.equal(canvas.from_work(work), frames)


def test_cover_keeps_the_aspect_and_takes_the_centre():
    frames = torch.zeros(1, 40, 100, 3)
    frames[:, :, 30:70] = 1
    canvas = cover((40, 100), (40, 40))
    assert torch.equal(canvas.to_work(frames), torch.ones(1, 40, 40, 3))
    result = torch.rand(1, 40, 40, 3)
    assert torch.equal(canvas.from_work(result), result)


@pytest.mark.parametrize("source", [(80, 80), (20, 20), (80, 81), (40, 40)])
def test_a_covered_frame_is_the_result_whatever_the_aspect(source):
    result = torch.rand(1, 40, 40, 3)
    assert torch.equal(cover(source, (40, 40)).from_work(result), result)


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_of_a_line_covers_a_frame_without_scaling_all_of_it(turned):
    line = torch.zeros(1, 1, 400_000, 3)
    line[:, :, 199_998:200_002] = 1  # scaled whole it would take 4 TiB
    line = line.transpose(1, 2) if turned else line
    canvas = cover(tuple(line.shape[1:3]), (1024, 1024))
    assert torch.equal(canvas.to_work(line), torch.ones(1, 1024, 1024, 3))


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 128), st.integers(1, 128))
def test_covering_scales_at_most_what_the_ratio_allows(height, width, rows, columns):
    canvas = cover((height, width), (16 * rows, 16 * columns))
    middle = canvas._middle()
    within = cover(middle, canvas.work)
    assert within._middle() == middle
    scale = max(work / given_side for work, given_side in zip(canvas.work, middle, strict=True))
    assert all(side <= 4 * work + scale + 1 for side, work in zip(within.resized, canvas.work, strict=True))


def test_a_picture_of_the_frames_size_is_untouched():
    frames = torch.rand(2, 32, 48, 3)
    for place in (cover, keep):
        canvas = place((32, 48), (32, 48))
        assert torch.equal(canvas.to_work(frames), frames) and torch.equal(canvas.from_work(frames), frames)


def test_a_kept_picture_is_not_distorted():
    canvas = keep((100, 300), (512, 512))
    assert canvas.resized == (171, 512)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1000, 1100), (1008, 1104)),
        ((3000, 4000), (896, 1184)),
        ((1, 1), (1024, 1024)),
        ((512, 512), (1024, 1024)),
        ((800, 800), (800, 800)),
    ],
)
def test_size_of_a_kept_picture_at_the_released_sizes(size, expected):
    assert kept_size(*size, max_area=1024 * 1024, largest_area=1024 * 1024, multiple=16) == expected


def test_limits_name_the_size_and_the_fix():
    check_ratio(100, 400)
    with pytest.raises(ValueError, match=r"401x100 is longer than 4:1.*crop it"):
        check_ratio(100, 401)
    check_side(2048, 2048)
    check_ratio(1, 1)
    with pytest.raises(ValueError, match=r"100x401 is longer than 4:1"):
        check_ratio(401, 100)
    with pytest.raises(ValueError, match="width 2064 is beyond the 2048"):
        check_side(64, 2064)
    with pytest.raises(ValueError, match="height 2064 is beyond the 2048"):
        check_side(2064, 64)


def test_edges_are_repeated():
    frames = torch.arange(6.0).reshape(1, 2, 3, 1)
    wide = extend_edges(frames, (1, 0, 2, 3))
    assert wide.shape == (1, 5, 6, 1)
    assert torch.equal(wide[0, 0, :, 0], torch.tensor([0.0, 0, 1, 2, 2, 2]))
    assert torch.equal(wide[0, 2:, 1:4, 0], frames[0, 1:, :, 0].expand(3, 3))
