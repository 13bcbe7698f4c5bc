"""Tile plans and tiled passes: coverage, weights, memory estimate, and equality where tiling must change nothing."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5_core.bench.live import LiveBytes
from kandinsky5_core.config import FLUX_VAE, HUNYUAN_VAE, VARIANTS, VAEConfig
from kandinsky5_core.shapes import LatentShape, VideoShape
from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.latents import sample_posterior
from kandinsky5_core.vae.tiling import (
    TilePlan,
    activation_bytes,
    axis_pieces,
    decode_tiled,
    encode_tiled,
    plan_decode,
    plan_encode,
)

TINY = {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "scaling_factor": 1.0}
TINY_HUNYUAN = VAEConfig(kind="hunyuan", **TINY)
TINY_FLUX = VAEConfig(kind="flux", temporal_ratio=1, **TINY)
BOTH = pytest.mark.parametrize("config", [TINY_HUNYUAN, TINY_FLUX], ids=["hunyuan", "flux"])
MIB = 2**20
FAST = settings(deadline=None, database=None)


def random_vae(config: VAEConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return (HunyuanVAE if config.kind == "hunyuan" else FluxVAE)(config).eval()


class RepeatVAE:
    """Decodes by repeating cells and encodes by picking pixels: no cell sees another, so tiling must change nothing."""

    def __init__(self, config: VAEConfig) -> None:
        self.config = dataclasses.replace(config, latent_channels=3)

    def decode(self, latents):
        times = torch.tensor([1] + [self.config.temporal_ratio] * (latents.shape[2] - 1))
        pixels = latents.repeat_interleave(times, dim=2)
        return pixels.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    def moments(self, pixels):
        mean = pixels[:, :, :: self.config.temporal_ratio, 3::8, 5::8]
        return mean, 2 * mean

    def encode(self, pixels, generator=None):
        assert generator is None
        return self.moments(pixels)[0]


def total_weights(pieces, size: int) -> torch.Tensor:
    total = torch.zeros(size)
    for piece in pieces:
        total[piece.write] += piece.weights
    return total


def video_frame_edge(frame: int) -> int:
    return 4 * (frame - 1) + 1 if frame else 0


@FAST
@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_pieces_cover_an_axis_with_weights_that_add_up_to_one(size, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    pieces = axis_pieces(size, tile, overlap, edge=lambda cell: 8 * cell)
    assert pieces[0].start == 0 and pieces[-1].stop == size
    assert all(piece.stop - piece.start == min(tile, size) for piece in pieces)
    assert all(a.stop - b.start >= overlap for a, b in itertools.pairwise(pieces))
    assert all((piece.weights > 0).all() for piece in pieces)
    torch.testing.assert_close(total_weights(pieces, 8 * size), torch.ones(8 * size), atol=1e-6, rtol=0)


@FAST
@given(st.integers(1, 130), st.integers(2, 40), st.data())
def test_pieces_in_time_drop_their_context_and_still_cover_every_frame(size, tile, data):
    overlap = data.draw(st.integers(1, tile - 1))
    pieces = axis_pieces(size, tile, overlap, context=1, edge=video_frame_edge)
    num_frames = 4 * (size - 1) + 1
    for piece in pieces:
        assert piece.write == slice(video_frame_edge(piece.start + (piece.start > 0)), 4 * (piece.stop - 1) + 1)
    torch.testing.assert_close(total_weights(pieces, num_frames), torch.ones(num_frames), atol=1e-6, rtol=0)


def test_blending_is_linear():
    first, second = axis_pieces(6, 4, 2, edge=lambda cell: 2 * cell)
    assert second.weights.tolist() == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1, 1, 1])
    assert first.weights.tolist() == pytest.approx([1, 1, 1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8])


def every_size():
    for row in VARIANTS.values():
        for (height, width), frames in itertools.product(row.resolutions, {1, row.num_frames}):
            yield row.vae, VideoShape(1, frames, height, width)


@pytest.mark.parametrize("budget", [512 * MIB, 4096 * MIB, 24 * 1024 * MIB])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_plans_cover_every_pixel_of_every_released_size_within_the_budget(direction, budget):
    for config, clip in set(every_size()):
        shape = clip.latent_shape(config)
        pixel_shape = (1, 3, *clip[1:])
        make = {"decode": (plan_decode, shape), "encode": (plan_encode, pixel_shape)}
        plan = make[direction][0](make[direction][1], config, budget_bytes=budget)
        tile = LatentShape(1, 16, plan.frames, plan.height, plan.width)
        assert activation_bytes(tile, config, direction=direction) <= budget
        causal = config.kind == "hunyuan"
        edge = video_frame_edge if causal else lambda frame: frame
        in_time = axis_pieces(shape.frames, plan.frames, plan.overlap_frames, context=int(causal), edge=edge)
        assert total_weights(in_time, clip.frames).allclose(torch.ones(clip.frames))
        for axis in ("height", "width"):
            pieces = axis_pieces(
                getattr(shape, axis), getattr(plan, axis), getattr(plan, f"overlap_{axis}"), edge=lambda cell: 8 * cell
            )
            assert total_weights(pieces, getattr(clip, axis)).allclose(torch.ones(getattr(clip, axis)))


@FAST
@given(
    st.sampled_from([HUNYUAN_VAE, FLUX_VAE]),
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(2, 200), st.integers(2, 200)),
    st.integers(400, 12_000),
)
def test_a_plan_for_any_size_fits_its_budget(config, size, budget_mib):
    shape = LatentShape(size[0], 16, *size[1:])
    plan = plan_decode(shape, config, budget_bytes=budget_mib * MIB)
    tile = LatentShape(plan.batch, 16, plan.frames, plan.height, plan.width)
    assert activation_bytes(tile, config, direction="decode") <= budget_mib * MIB
    assert plan.num_tiles(shape) == 1 or activation_bytes(shape, config, direction="decode") > budget_mib * MIB
    assert plan == plan_decode(tuple(shape), config, budget_bytes=budget_mib * MIB)


def test_known_plans():
    five_seconds = VideoShape(1, 121, 512, 768).latent_shape(HUNYUAN_VAE)
    assert plan_decode(five_seconds, HUNYUAN_VAE) == TilePlan(
        frames=5, height=34, width=35, overlap_frames=3, overlap_height=4, overlap_width=4
    )
    # However large the budget, no tensor may outgrow 32-bit indices.
    assert plan_decode(five_seconds, HUNYUAN_VAE, budget_bytes=2**40).num_tiles(five_seconds) == 8
    image = VideoShape(1, 1, 1024, 1024).latent_shape(FLUX_VAE)
    assert plan_decode(image, FLUX_VAE) == TilePlan(frames=1, height=128, width=128)
    batch = LatentShape(4, 16, 1, 128, 128)
    assert plan_decode(batch, FLUX_VAE) == TilePlan(frames=1, height=128, width=128, batch=1)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@BOTH
def test_a_budget_too_small_is_refused_with_what_it_takes(config, direction):
    make, shape = {
        "decode": (plan_decode, (1, 16, 9, 16, 16)),
        "encode": (plan_encode, (1, 3, 33, 128, 128)),
    }[direction]
    with pytest.raises(ValueError, match=rf"budget 0 MiB is too small to {direction}.* takes \d+ MiB"):
        make(shape, config, budget_bytes=1000)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("config", [HUNYUAN_VAE, FLUX_VAE], ids=["hunyuan", "flux"])
def test_the_memory_estimate_is_the_live_tensors_and_a_quarter(config, frames, direction):
    with torch.device("meta"):
        vae = random_vae(config).bfloat16()
        shape = LatentShape(1, 16, frames, 24, 40)
        clip = VideoShape.from_latent(shape, config)
        given_shape = shape if direction == "decode" else (1, 3, *clip[1:])
        argument = torch.empty(given_shape, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        getattr(vae, direction)(argument)
    estimate = activation_bytes(shape, config, direction=direction, bytes_per_element=2)
    assert 1.2 < estimate / live.peak < 1.45


@BOTH
def test_one_tile_is_exactly_the_untiled_pass(config):
    vae = random_vae(config)
    latents, pixels = torch.randn(1, 16, 3, 4, 6), torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        for plan in (plan_decode(latents.shape, config), TilePlan(frames=9, height=9, width=9)):
            assert torch.equal(decode_tiled(vae, latents, plan), vae.decode(latents))
        plan = plan_encode(pixels.shape, config)
        assert torch.equal(encode_tiled(vae, pixels, plan), vae.encode(pixels))
        sampled = encode_tiled(vae, pixels, plan, generator=torch.Generator().manual_seed(1))
        assert torch.equal(sampled, vae.encode(pixels, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("plan_sizes", [(3, 4, 5, 1, 2, 2), (4, 3, 3, 2, 1, 0), (6, 5, 4, 3, 4, 3), (9, 9, 3, 0, 0, 1)])
@BOTH
def test_tiles_are_put_where_they_belong(config, plan_sizes, frames):
    vae = RepeatVAE(config)
    names = ("frames", "height", "width", "overlap_frames", "overlap_height", "overlap_width")
    plan = TilePlan(**dict(zip(names, plan_sizes, strict=True)))
    torch.manual_seed(frames)
    latents = torch.randn(2, 3, frames, 7, 11)
    torch.testing.assert_close(decode_tiled(vae, latents, plan), vae.decode(latents), atol=1e-5, rtol=0)
    pixels = torch.randn(2, 3, config.temporal_ratio * (frames - 1) + 1, 56, 88)
    torch.testing.assert_close(encode_tiled(vae, pixels, plan), vae.encode(pixels), atol=1e-5, rtol=0)


def test_a_sample_is_drawn_after_blending():
    vae = RepeatVAE(TINY_HUNYUAN)
    pixels = torch.randn(1, 3, 5, 48, 48)
    plan = TilePlan(frames=2, height=4, width=4, overlap_height=3, overlap_width=3)
    sampled = encode_tiled(vae, pixels, plan, generator=torch.Generator().manual_seed(5))
    mean, logvar = vae.moments(pixels)
    expected = sample_posterior(mean, logvar, torch.Generator().manual_seed(5))
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)


def test_a_later_piece_in_time_is_decoded_and_encoded_with_one_frame_of_context():
    vae = random_vae(TINY_HUNYUAN)
    plan = TilePlan(frames=3, height=2, width=2, overlap_frames=1)
    latents, pixels = torch.randn(1, 16, 5, 2, 2), torch.rand(1, 3, 17, 16, 16)
    with torch.no_grad():
        decoded, encoded = decode_tiled(vae, latents, plan), encode_tiled(vae, pixels, plan)
        assert torch.equal(decoded[:, :, :9], vae.decode(latents[:, :, :3]))
        assert torch.equal(decoded[:, :, 9:], vae.decode(latents[:, :, 2:])[:, :, 1:])
        assert torch.equal(encoded[:, :, :3], vae.encode(pixels[:, :, :9]))
        assert torch.equal(encoded[:, :, 3:], vae.encode(pixels[:, :, 8:])[:, :, 1:])


def test_frames_of_the_image_vae_do_not_depend_on_tiling_in_time():
    vae = random_vae(TINY_FLUX)
    latents = torch.randn(1, 16, 5, 4, 4)
    with torch.no_grad():
        whole = vae.decode(latents)
    tiled = decode_tiled(vae, latents, TilePlan(frames=2, height=4, width=4))
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)


def test_1408_pixels_stay_1408():
    # The official tiles for this size, 488 pixels wide with 32 shared, end at 1400.
    plan = TilePlan(frames=1, height=80, width=61, overlap_width=4)
    latents = torch.randn(1, 16, 1, 80, 176)
    repeat, three = RepeatVAE(TINY_HUNYUAN), latents[:, :3]
    pixels = decode_tiled(repeat, three, plan)
    assert pixels.shape == (1, 3, 1, 640, 1408)
    torch.testing.assert_close(pixels, repeat.decode(three), atol=1e-5, rtol=0)
    vae, strip = random_vae(TINY_HUNYUAN), latents[:, :, :, :8]
    with torch.no_grad():
        last = vae.decode(strip[..., 176 - 61 :])
    assert torch.equal(decode_tiled(vae, strip, plan)[..., -8:], last[..., -8:])


def test_a_batch_can_be_decoded_clip_by_clip():
    vae = random_vae(TINY_HUNYUAN)
    latents = torch.randn(3, 16, 2, 4, 4)
    seen = []
    plan = TilePlan(frames=2, height=4, width=4, batch=2)
    pixels = decode_tiled(vae, latents, plan, lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        torch.testing.assert_close(pixels, vae.decode(latents), atol=1e-5, rtol=1e-5)
    assert seen == [(1, 2), (2, 2)]


def test_results_are_fp32_whatever_the_vae_runs_in():
    vae = random_vae(TINY_FLUX).bfloat16()
    latents = torch.randn(1, 16, 1, 6, 6).bfloat16()
    for width in (4, 6):
        pixels = decode_tiled(vae, latents, TilePlan(frames=1, height=6, width=width), output_device="cpu")
        assert pixels.dtype == torch.float32 and not pixels.requires_grad


def test_on_tile_reports_and_can_cancel():
    vae, plan = RepeatVAE(TINY_HUNYUAN), TilePlan(frames=2, height=2, width=2, overlap_frames=1)
    latents = torch.randn(1, 3, 3, 4, 4)
    seen = []
    decode_tiled(vae, latents, plan, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)] and plan.num_tiles(latents.shape) == 8

    def cancel(done, total):
        if done == 3:
            raise KeyboardInterrupt

    calls = []
    counting = SimpleNamespace(config=vae.config, decode=lambda x: calls.append(1) or vae.decode(x))
    with pytest.raises(KeyboardInterrupt):
        decode_tiled(counting, latents, plan, cancel)
    assert len(calls) == 3


def test_mistakes_are_named():
    vae = RepeatVAE(TINY_HUNYUAN)
    with pytest.raises(ValueError, match="tile width 4 does not go with overlap_width 4"):
        TilePlan(frames=1, height=4, width=4, overlap_width=4)
    with pytest.raises(ValueError, match="batch 0"):
        TilePlan(frames=1, height=4, width=4, batch=0)
    with pytest.raises(ValueError, match="overlap_frames 0 is too small"):
        decode_tiled(vae, torch.randn(1, 3, 5, 4, 4), TilePlan(frames=2, height=4, width=4))
    plan = TilePlan(frames=2, height=4, width=4)
    with pytest.raises(ValueError, match=r"4 frames of 32x20 pixels .*multiples of 8 and 4k\+1 frames"):
        encode_tiled(vae, torch.randn(1, 3, 4, 20, 32), plan)
    with pytest.raises(ValueError, match=r"expected \(B, 3, F, H, W\)"):
        encode_tiled(vae, torch.randn(1, 4, 16, 16), plan)


def test_every_released_size_takes_few_tiles_at_the_default_budget():
    counts = {
        (row.name, size): plan_decode(shape := VideoShape(1, row.num_frames, *size).latent_shape(row.vae), row.vae)
        .num_tiles(shape)
        for row in VARIANTS.values()
        for size in row.resolutions
    }  # fmt: skip
    assert all(count == 1 for (name, _), count in counts.items() if name.startswith(("image", "nano")))
    assert max(counts.values()) <= 500 and math.isfinite(sum(counts.values()))
