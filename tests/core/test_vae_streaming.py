"""The VAE layer by layer and streamed: equal to the plain pass, within the estimated memory, chosen by a budget."""

import dataclasses
import itertools
import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5_core.bench.live import LiveBytes
from kandinsky5_core.config import HUNYUAN_VAE, VARIANTS, VAEConfig
from kandinsky5_core.loading import load
from kandinsky5_core.nano.drawing import random_clip
from kandinsky5_core.pipeline import generate
from kandinsky5_core.request import Request
from kandinsky5_core.shapes import LatentShape, VideoShape
from kandinsky5_core.vae import within
from kandinsky5_core.vae.hunyuan import passes
from kandinsky5_core.vae.hunyuan.carry import CarriedConv, CarriedUpsample
from kandinsky5_core.vae.hunyuan.convolve import convolve, in_pairs
from kandinsky5_core.vae.hunyuan.layered import layered
from kandinsky5_core.vae.hunyuan.layers import CausalConv3d, Upsample
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.hunyuan.norms import moments_over, normed
from kandinsky5_core.vae.hunyuan.passes import decode_streamed, encode_streamed
from kandinsky5_core.vae.hunyuan.units import decoder_units, encoder_units
from kandinsky5_core.vae.hunyuan.upsample import fold_kernels
from kandinsky5_core.vae.pass_plan import describe, is_plain, plan_bytes, plan_pass
from kandinsky5_core.vae.stream_cost import Unit, decoder_costs, encoder_costs
from kandinsky5_core.vae.stream_plan import Costs, StreamPlan, plan_stream, stream_bytes, stream_work
from kandinsky5_core.vae.tile_plan import TilePlan, activation_bytes, tile_work
from kandinsky5_core.vae.tiling import decode_tiled, encode_tiled

TINY = VAEConfig(
    kind="hunyuan", block_out_channels=(4, 8, 8, 16), layers_per_block=1, norm_num_groups=2, scaling_factor=1.0
)
MIB = 2**20
DIRECTIONS = pytest.mark.parametrize("direction", ["decode", "encode"])
STREAMED = {"decode": decode_streamed, "encode": encode_streamed}
TILED = {"decode": decode_tiled, "encode": encode_tiled}


@pytest.fixture
def vae() -> HunyuanVAE:
    torch.manual_seed(random.randrange(1000))
    return HunyuanVAE(TINY).eval()


def clip_of(direction: str, frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Latents of so many latent frames and cells, or pixels that are encoded to such."""
    if direction == "decode":
        return torch.randn(batch, 16, frames, height, width)
    return torch.rand(batch, 3, 4 * frames - 3, 8 * height, 8 * width) * 2 - 1


def whole(frames: int, shape: tuple[int, int], exact_levels: int = 4, **sizes: int) -> StreamPlan:
    return StreamPlan(exact_levels=exact_levels, frames=frames, height=shape[0], width=shape[1], **sizes)


def plain(vae: HunyuanVAE, direction: str, clip: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return getattr(vae, direction)(clip)


@DIRECTIONS
@pytest.mark.parametrize(("latent_frames", "batch"), [(1, 1), (2, 2), (5, 1)])
@pytest.mark.parametrize("frames", [1, 3, 4, 8, 64])
def test_layer_by_layer_is_the_plain_pass(vae, direction, latent_frames, batch, frames):
    clip = clip_of(direction, latent_frames, 3, 4, batch)
    expected = plain(vae, direction, clip)
    seen = []
    found = STREAMED[direction](vae, clip, whole(frames, (3, 4)), lambda *step: seen.append(step))
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert seen == [(step, len(seen)) for step in range(1, len(seen) + 1)] and seen


@DIRECTIONS
@pytest.mark.parametrize("exact_levels", [1, 2, 3])
@pytest.mark.parametrize(("frames", "tile"), [(1, (9, 14)), (4, (9, 14)), (8, (5, 7))])
def test_streamed_with_true_statistics_is_the_plain_pass(vae, direction, exact_levels, frames, tile, monkeypatch):
    clip = clip_of(direction, 3, 9, 14)
    margin = Costs.of(TINY, direction, exact_levels).margin(TINY)
    true = {}
    units = decoder_units(vae) if direction == "decode" else encoder_units(vae)
    with torch.no_grad():
        layered(units, [clip], true, lambda: None)

    def knowing(units, pieces, known, on_step, *, separate=False):
        if separate:
            known.update(true)
            return None
        return layered(units, pieces, known, on_step)

    monkeypatch.setattr(passes, "layered", knowing)
    expected = plain(vae, direction, clip)
    plan = whole(frames, tile, exact_levels, margin=margin)
    steps = []
    found = STREAMED[direction](vae, clip, plan, lambda *step: steps.append(step))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    # The samples' steps are left out here.
    assert steps[0][0] == 1 and 0 < steps[-1][0] == len(steps) < steps[-1][1]
    if tile != (9, 14):
        # Without its margin the tile would show.
        short = dataclasses.replace(plan, margin=0)
        assert (STREAMED[direction](vae, clip, short) - expected).abs().max() > 1e-4


@DIRECTIONS
@pytest.mark.parametrize("exact_levels", [1, 2, 3])
def test_samples_are_cut_where_they_say(vae, direction, exact_levels):
    """A sample of all of a clip of two latent frames is the clip, and so are its statistics; others are near."""
    sample = {"windows": 1, "window_height": 6, "window_width": 6}
    clip = clip_of(direction, 2, 6, 6)
    found = STREAMED[direction](vae, clip, whole(4, (6, 6), exact_levels, **sample))
    torch.testing.assert_close(found, plain(vae, direction, clip), atol=3e-5, rtol=1e-5)
    clip = clip_of(direction, 6, 6, 8)
    found = STREAMED[direction](vae, clip, whole(4, (6, 8), exact_levels, **sample))
    expected = plain(vae, direction, clip)
    # How near a sample is depends on the weights drawn; that it is the same clip does not.
    likeness = torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]
    assert likeness > 0.7 and not torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
@settings(deadline=None, database=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_a_carried_convolution_is_that_of_the_clip_for_any_split(kernel, stride, lengths):
    stride = stride if kernel == 3 else (1, 1, 1)
    layer = CausalConv3d(3, 5, kernel, stride, ops=torch.nn)
    clip = torch.randn(1, 3, sum(lengths), 6, 8)
    carried = CarriedConv(layer)
    with torch.no_grad():
        made = [carried.convolve(carried.join(piece)) for piece in clip.split(lengths, dim=2)]
        made = torch.cat([piece for piece in made if piece is not None], dim=2)
        torch.testing.assert_close(made, layer(clip), atol=1e-5, rtol=1e-5)


@settings(deadline=None, database=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=6), in_time=st.sampled_from([1, 2]))
def test_pieces_are_upsampled_as_the_clip(lengths, in_time):
    layer = Upsample(3, (in_time, 2, 2), ops=torch.nn)
    carried, clip = CarriedUpsample(layer), torch.randn(1, 3, sum(lengths), 4, 5)
    with torch.no_grad():
        made = [carried.convolve(carried.join(piece)) for piece in clip.split(lengths, dim=2)]
        torch.testing.assert_close(torch.cat(made, dim=2), layer(clip), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_time", [1, 2])
def test_costs_know_the_folded_kernels(in_time):
    layer = Upsample(3, (in_time, 2, 2), ops=torch.nn)
    kernels = fold_kernels(layer, torch.zeros(1))
    cost = Unit(kind="up", wide_in=3, wide_out=3, before=(in_time, 2), after=(1, 1))
    assert cost.phases == len(kernels) and cost.folded == sum(kernel.numel() for kernel in kernels.values())
    assert {kernel[0, 0].numel() for kernel in kernels.values()} == {cost.phase_taps}
    assert cost.work / cost.plain_work == pytest.approx(8 / 27 if in_time == 2 else 12 / 27)
    total = layer.conv.conv.weight.sum(dim=(2, 3, 4))
    assert all(torch.allclose(kernel.sum(dim=(2, 3, 4)), total, atol=1e-5) for kernel in kernels.values())


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_pairs_of_frames_are_the_convolution_as_near_as_the_plain_sum(frames):
    conv = torch.nn.Conv3d(40, 36, 3)
    x = torch.randn(1, 40, frames + 2, 18, 18)
    with torch.no_grad():
        true = torch.nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double())
        errors = [(made - true).square().mean().sqrt() for made in (in_pairs(x, conv.weight, conv.bias), conv(x))]
        assert torch.equal(convolve(conv, x), in_pairs(x, conv.weight, conv.bias)), "large enough for pairs"
    assert errors[0] < 1.5 * errors[1] < 1e-5


def test_statistics_of_pieces_are_those_of_the_clip():
    norm, clip = torch.nn.GroupNorm(4, 8), torch.randn(1, 8, 7, 5, 6) * 3 + 20
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        found = normed(norm, moments_over(norm, clip.split([1, 4, 2], dim=2)), clip)
        torch.testing.assert_close(found, norm(clip), atol=1e-4, rtol=1e-4)


@DIRECTIONS
def test_in_16_bits_it_is_as_near_to_fp32_as_the_plain_pass(vae, direction):
    clip = clip_of(direction, 3, 4, 4)
    true, half = plain(vae, direction, clip), vae.bfloat16()
    expected = plain(half, direction, clip.bfloat16()).float()
    found = STREAMED[direction](half, clip.bfloat16(), whole(4, (4, 4)))
    assert (found - true).pow(2).mean() < 1.5 * (expected - true).pow(2).mean()


def test_a_posterior_sample_is_the_plain_one(vae):
    pixels = clip_of("encode", 2, 4, 4, 2)
    with torch.no_grad():
        expected = vae.encode(pixels, torch.Generator().manual_seed(3))
    found = encode_streamed(vae, pixels, whole(4, (4, 4)), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


def test_what_a_step_raises_ends_the_work(vae):
    def cancel(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_streamed(vae, clip_of("decode", 2, 4, 4), whole(4, (4, 4)), cancel)


def test_costs_know_the_units():
    with torch.device("meta"):
        full = HunyuanVAE(HUNYUAN_VAE)
    rows = ((decoder_units(full), decoder_costs(HUNYUAN_VAE)), (encoder_units(full), encoder_costs(HUNYUAN_VAE)))
    for units, costs in rows:
        for unit, cost in zip(units, costs, strict=True):
            weights = (unit if isinstance(unit, torch.nn.Module) else unit.conv).parameters()
            assert next(weight for weight in weights if weight.ndim > 1).shape[1] == cost.wide_in, cost


def full_size_peak(plan, direction, shape) -> int:
    """Bytes that a pass holds beside what is given, its result and the weights, of tensors without contents."""
    clip = VideoShape.from_latent(shape, HUNYUAN_VAE)
    with torch.device("meta"):
        full = HunyuanVAE(HUNYUAN_VAE).bfloat16()
        given_shape = shape if direction == "decode" else (1, 3, *clip[1:])
        argument = torch.empty(given_shape, dtype=torch.bfloat16)
    with LiveBytes() as live:
        out = STREAMED[direction](full, argument, plan)
    return live.peak - (out.nbytes if direction == "decode" else 0)


@DIRECTIONS
@pytest.mark.parametrize(
    ("clip", "budget_mib"),
    [((1, 17, 256, 384), 512), ((1, 17, 256, 384), 2048), ((1, 33, 256, 256), 1024)],
)
def test_the_memory_estimate_is_the_live_tensors_and_a_quarter(direction, clip, budget_mib):
    shape = VideoShape(*clip).latent_shape(HUNYUAN_VAE)
    plan = plan_stream(shape, HUNYUAN_VAE, direction=direction, budget_bytes=budget_mib * MIB)
    estimate = stream_bytes(plan, shape, HUNYUAN_VAE, direction=direction)
    assert 1.1 < estimate / full_size_peak(plan, direction, shape) < 1.4
    assert estimate <= budget_mib * MIB


@DIRECTIONS
def test_memory_barely_grows_with_the_number_of_frames(direction):
    """One plan for any length: what grows is the coarsest level, some bytes a pixel where the plain pass takes 2000."""
    plan = whole(2, (24, 32), 1, windows=1, window_height=24, window_width=32)
    shapes = [VideoShape(1, frames, 192, 256).latent_shape(HUNYUAN_VAE) for frames in (9, 33)]
    peaks = [full_size_peak(plan, direction, shape) for shape in shapes]
    assert (peaks[1] - peaks[0]) / (24 * 192 * 256) < 20
    assert peaks[1] < 0.5 * activation_bytes(shapes[1], HUNYUAN_VAE, direction=direction)


@settings(deadline=None, database=None, max_examples=30)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(2, 120), st.integers(2, 120)),
    st.integers(600, 24_000), st.sampled_from(["encode", "decode"]),
)  # fmt: skip
def test_a_plan_for_any_size_fits_its_budget_and_covers_the_clip(size, budget_mib, direction):
    shape, budget = LatentShape(size[0], 16, *size[1:]), budget_mib * MIB
    plan = plan_pass(shape, HUNYUAN_VAE, direction=direction, budget_bytes=budget)
    assert plan_bytes(plan, shape, HUNYUAN_VAE, direction=direction) <= budget
    assert plan == plan_pass(tuple(shape), HUNYUAN_VAE, direction=direction, budget_bytes=budget)
    assert describe(plan, shape, HUNYUAN_VAE)
    if isinstance(plan, StreamPlan):
        covered = torch.zeros(shape.height, shape.width)
        for tile in plan.tiles(shape):
            covered[tile.rows.keep_start : tile.rows.keep_stop, tile.columns.keep_start : tile.columns.keep_stop] += 1
        assert (covered == 1).all()
        for frame, row, column in plan.window_places(shape):
            assert frame < shape.frames
            assert row + plan.window_height <= shape.height and column + plan.window_width <= shape.width


@DIRECTIONS
def test_one_frame_at_a_time_is_taken_only_where_it_saves_more_than_its_copies(direction):
    shape, sizes = VideoShape(1, 121, 512, 768).latent_shape(HUNYUAN_VAE), {"direction": direction}
    frames = [
        plan_stream(shape, HUNYUAN_VAE, budget_bytes=mib * MIB, **sizes).frames for mib in (900, 2048, 4096, 16384)
    ]
    assert frames[0] == 1 < min(frames[1:])


def test_decoding_layer_by_layer_is_less_work_than_the_plain_pass():
    shape = VideoShape(1, 121, 512, 768).latent_shape(HUNYUAN_VAE)
    works = {way: stream_work(whole(16, shape[3:]), shape, HUNYUAN_VAE, direction=way) for way in STREAMED}
    assert works["encode"] == 1 and 0.7 < works["decode"] < 0.8


def test_the_released_sizes_stream_with_less_work_than_tiles():
    rows = [row for row in VARIANTS.values() if row.vae == HUNYUAN_VAE]
    clips = {VideoShape(1, row.num_frames, *max(row.resolutions)) for row in rows if row.num_frames > 1}
    for clip, direction in itertools.product(clips, ("encode", "decode")):
        shape, sizes = clip.latent_shape(HUNYUAN_VAE), {"direction": direction, "budget_bytes": 4096 * MIB}
        streamed, tiles = (plan_pass(shape, HUNYUAN_VAE, can_stream=can, **sizes) for can in (True, False))
        assert isinstance(streamed, StreamPlan) and isinstance(tiles, TilePlan)
        work = stream_work(streamed, shape, HUNYUAN_VAE, direction=direction)
        assert work < 0.8 * tile_work(tiles, shape, HUNYUAN_VAE), clip


@DIRECTIONS
def test_what_fits_runs_plainly_bit_by_bit(vae, direction, caplog):
    clip, told = clip_of(direction, 3, 4, 4), {}
    with caplog.at_level(logging.INFO, logger=within.__name__):
        found = getattr(within, f"{direction}_within")(vae, clip, 2**30, told=told)
    assert torch.equal(found, plain(vae, direction, clip)) and told == {f"vae_{direction}": "plain"}
    assert [record.message.endswith(": plain") for record in caplog.records] == [True]


@DIRECTIONS
def test_a_smaller_budget_changes_the_way_and_hardly_the_result(vae, direction):
    clip = clip_of(direction, 7, 10, 12)
    expected, shape = plain(vae, direction, clip), LatentShape(1, 16, 7, 10, 12)
    whole_bytes = activation_bytes(shape, TINY, direction=direction, bytes_per_element=4)
    ways = set()
    for share in (0.9, 0.5, 0.25):
        told = {}
        found = getattr(within, f"{direction}_within")(vae, clip, int(share * whole_bytes), told=told)
        way = told[f"vae_{direction}"]
        ways.add(way.split(":")[0])
        error = (found - expected).pow(2).mean().sqrt()
        assert error < (1e-4 if way.startswith("layer") else 0.3 * expected.std()), way
    assert {"layer by layer, exact", "streamed"} <= ways


@DIRECTIONS
def test_streaming_is_nearer_to_the_plain_pass_than_tiles_on_trained_weights(direction):
    vae = load("nano-video").vae
    _, frames = random_clip(random.Random(5), 25, (48, 48))
    clip = (frames * 2 - 1).permute(3, 0, 1, 2)[None]
    if direction == "decode":
        clip = plain(vae, "encode", clip)
    expected = plain(vae, direction, clip)
    tiles = TilePlan(frames=5, height=6, width=6, overlap_frames=3)
    plan = whole(8, (6, 6), 2, windows=1, window_height=6, window_width=6)
    errors = [
        (run(vae, clip, way) - expected).pow(2).mean().item()
        for run, way in ((STREAMED[direction], plan), (TILED[direction], tiles))
    ]
    assert errors[0] < 0.5 * errors[1]


class FailingConv(torch.nn.Module):
    """Runs out of memory for inputs of more than so many elements."""

    def __init__(self, conv: torch.nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.conv, self.most, self.error = conv, most, error
        self.kernel_size, self.stride = conv.kernel_size, conv.stride

    def forward(self, x):
        if x.numel() > self.most:
            raise self.error
        return self.conv(x)


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@DIRECTIONS
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_planned_again_and_said(vae, direction, error, caplog):
    clip = clip_of(direction, 5, 10, 10)
    expected = plain(vae, direction, clip)
    last = vae.decoder.conv_out if direction == "decode" else vae.encoder.conv_in
    # The plain pass shows it 19 frames with the padding; pieces of 8 have at most 10.
    last.conv = FailingConv(last.conv, last.conv.in_channels * 10 * 82 * 82, error)
    told = {}
    found = getattr(within, f"{direction}_within")(vae, clip, 2**30, told=told)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings and all("ran out of memory" in text and "MiB" in text for text in warnings)
    assert told[f"vae_{direction}"] != "plain" and found.shape == expected.shape
    if told[f"vae_{direction}"].startswith("layer"):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    elif told[f"vae_{direction}"].startswith("streamed"):
        assert (found - expected).pow(2).mean().sqrt() < 0.3 * expected.std()


@DIRECTIONS
def test_giving_up_is_one_clear_error(vae, direction):
    clip = clip_of(direction, 3, 16, 16)
    last = vae.decoder.conv_out if direction == "decode" else vae.encoder.conv_in
    last.conv = FailingConv(last.conv, 0, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match=rf"VAE {direction} ran out of memory .*no smaller way is left.*CUDA out"):
        getattr(within, f"{direction}_within")(vae, clip, 2**30)


def test_other_errors_pass_through(vae, caplog):
    vae.decoder.conv_out.conv = FailingConv(vae.decoder.conv_out.conv, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        within.decode_within(vae, clip_of("decode", 3, 4, 4), 2**30)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_mistakes_are_named(vae):
    with pytest.raises(ValueError, match="budget 0 MiB is too small to decode"):
        within.decode_within(vae, clip_of("decode", 9, 16, 16), 1000)
    with pytest.raises(ValueError, match="stream plan frames 0 must be at least 1"):
        StreamPlan(exact_levels=1, frames=0, height=4, width=4)
    with pytest.raises(ValueError, match=r"4k\+1 frames"):
        within.encode_within(vae, torch.zeros(1, 3, 4, 32, 32), 2**30)


def test_a_run_says_which_way_the_vae_went():
    models = load("nano-video")
    request = Request(prompt="a red circle moves right", num_steps=1, cache="off")
    made = generate(models, request)
    assert made.settings["vae_decode"] == "plain" and "vae_encode" not in made.settings
    small = generate(models, dataclasses.replace(request, vae_budget_bytes=24 * MIB))
    assert small.settings["vae_decode"] != "plain"
    assert (small.frames - made.frames).abs().mean() < 0.02
    shape = VideoShape(1, 17, 64, 64).latent_shape(models.variant.vae)
    assert is_plain(plan_pass(shape, models.variant.vae, direction="decode", budget_bytes=2**32), shape)
