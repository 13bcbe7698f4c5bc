"""The VAE benchmark's rivals are what they are called, and its page shows what was measured."""

import random

import pytest
import torch

from benchmarks.vae_page import HEAD, Row, markdown, plot
from benchmarks.vae_ways import diffusers_pass, official_tiles, psnr, seams, untiled, ways_of
from kandinsky5_core.config import HUNYUAN_VAE, VAEConfig
from kandinsky5_core.shapes import LatentShape, VideoShape
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE

TINY = VAEConfig(
    kind="hunyuan", block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=1.0
)


@pytest.fixture
def vae() -> HunyuanVAE:
    torch.manual_seed(random.randrange(1000))
    return HunyuanVAE(TINY).eval().requires_grad_(False)


def given(direction: str, frames: int) -> torch.Tensor:
    shape = VideoShape(1, frames, 32, 48)
    return torch.randn(shape.latent_shape(TINY) if direction == "decode" else (1, 3, *shape[1:]))


def test_official_tiles_of_five_seconds_are_fourteen_of_17_frames():
    shape = VideoShape(1, 121, 512, 768).latent_shape(HUNYUAN_VAE)
    assert official_tiles(shape, 1).num_tiles(shape) == 14
    assert official_tiles(shape, 2).num_tiles(shape) == 4 * 14
    single = VideoShape(1, 1, 512, 768).latent_shape(HUNYUAN_VAE)
    assert official_tiles(single, 1).num_tiles(single) == 1


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_diffusers_is_the_untiled_pass_until_it_tiles(vae, direction):
    run = diffusers_pass(vae, direction)
    clip = given(direction, 9)
    torch.testing.assert_close(run(clip), untiled(vae, direction, clip), atol=3e-5, rtol=1e-4)
    clip = given(direction, 33)
    expected = untiled(vae, direction, clip)
    assert run(clip).shape == expected.shape and (run(clip) - expected).abs().max() > 1e-3


def test_ways_and_their_figures(vae):
    clip, shape = given("decode", 33), LatentShape(1, 16, 9, 4, 6)
    ways = ways_of(vae, "decode", shape, torch.float32, 1, [0.6])
    assert [way.kind for way in ways] == ["untiled", "official", "diffusers", "ours"]
    made = [way.run(clip) for way in ways]
    nearness = [psnr(other, made[0]) for other in made[1:]]
    assert nearness[-1] > 90 > max(nearness[:-1])
    jump = made[0].clone()
    jump[:, :, 9:] += 1
    assert seams(jump, made[0], ways[1].plan, shape, "decode", vae) > 3


def test_the_page(tmp_path):
    rows = [
        Row(
            direction="encode", size="8x8", frames=frames, kind=kind, way=kind, seconds=1.0, cpu_seconds=1.0,
            to_untiled=1.0, as_official=None if kind == "untiled" else 2.0, as_diffusers=None, peak_mib=3.0,
            budget_mib=None, psnr=None if kind == "untiled" else 40.0, seams=None,
        )
        for frames in (9, 17)
        for kind in ("untiled", "ours")
    ]  # fmt: skip
    text = markdown([HEAD, *(row.cells() for row in rows)]).splitlines()
    assert len(text) == 6 and {line.count("|") for line in text} == {len(HEAD) + 1}
    assert "| encode | 8x8x17 | ours | 1.00 | 1.00 | 2.00 |  | 3 | 40.0 |  |" in text
    plot(rows, tmp_path / "vae.png")
    assert (tmp_path / "vae.png").read_bytes().startswith(b"\x89PNG")
