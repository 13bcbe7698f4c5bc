"""Both VAEs against diffusers on random weights, and their latents' scale."""

import diffusers
import pytest
import torch

from kandinsky5_core.config import FLUX_VAE, HUNYUAN_VAE, NANO_VIDEO_VAE, VAEConfig
from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.latents import (
    frames_to_pixels,
    pixels_to_frames,
    sample_posterior,
    scale_latents,
    unscale_latents,
)

HUNYUAN_CONFIGS = [
    VAEConfig(kind="hunyuan", scaling_factor=1.0, block_out_channels=(8, 16, 24, 24), norm_num_groups=4),
    VAEConfig(
        kind="hunyuan",
        scaling_factor=1.0,
        block_out_channels=(12, 12, 18, 30),
        norm_num_groups=3,
        layers_per_block=1,
        latent_channels=5,
    ),
]
FLUX_CONFIGS = [
    VAEConfig(kind="flux", scaling_factor=1.0, block_out_channels=(8, 16, 24, 24), norm_num_groups=4, temporal_ratio=1),
    VAEConfig(
        kind="flux",
        scaling_factor=1.0,
        block_out_channels=(12, 18, 30),
        norm_num_groups=6,
        layers_per_block=1,
        latent_channels=5,
        temporal_ratio=1,
    ),
]


def reference(config: VAEConfig) -> torch.nn.Module:
    common = {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
    }
    levels = len(config.block_out_channels)
    if config.kind == "hunyuan":
        model = diffusers.AutoencoderKLHunyuanVideo(
            **common,
            down_block_types=("HunyuanVideoDownBlock3D",) * levels,
            up_block_types=("HunyuanVideoUpBlock3D",) * levels,
            spatial_compression_ratio=config.spatial_ratio,
            temporal_compression_ratio=config.temporal_ratio,
        )
        model.use_framewise_encoding = model.use_framewise_decoding = False
        return model
    return diffusers.AutoencoderKL(
        **common,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pair(config: VAEConfig, seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our VAE and diffusers' with the same weights, none of them at an initial value that could hide a mix-up."""
    torch.manual_seed(seed)
    theirs = reference(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    ours = (HunyuanVAE if config.kind == "hunyuan" else FluxVAE)(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(1, 1, 16, 16), (1, 5, 32, 16), (2, 9, 16, 40), (1, 17, 16, 16)])
@pytest.mark.parametrize("config", HUNYUAN_CONFIGS, ids=["two-layers", "odd-widths"])
@torch.no_grad()
def test_hunyuan_agrees_with_diffusers(config, size):
    ours, theirs = pair(config, seed=sum(size))
    batch, frames, height, width = size
    pixels = torch.rand(batch, 3, frames, height, width) * 2 - 1
    posterior = theirs.encode(pixels).latent_dist
    mean, logvar = ours.moments(pixels)
    assert mean.shape == (batch, config.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert relative_error(mean, posterior.mean) < 1e-4
    assert relative_error(logvar, posterior.logvar) < 1e-4
    latents = torch.randn(mean.shape)
    decoded = ours.decode(latents)
    assert decoded.shape == pixels.shape
    assert relative_error(decoded, theirs.decode(latents).sample) < 1e-4


@pytest.mark.parametrize("size", [(1, 1, 16, 16), (2, 1, 48, 32), (2, 3, 16, 40)])
@pytest.mark.parametrize("config", FLUX_CONFIGS, ids=["two-layers", "three-levels"])
@torch.no_grad()
def test_flux_agrees_with_diffusers_frame_by_frame(config, size):
    ours, theirs = pair(config, seed=sum(size))
    batch, frames, height, width = size
    pixels = torch.rand(batch, 3, frames, height, width) * 2 - 1
    mean, logvar = ours.moments(pixels)
    latents = torch.randn(mean.shape)
    decoded = ours.decode(latents)
    assert decoded.shape == pixels.shape
    for frame in range(frames):
        posterior = theirs.encode(pixels[:, :, frame]).latent_dist
        assert relative_error(mean[:, :, frame], posterior.mean) < 1e-4
        assert relative_error(logvar[:, :, frame], posterior.logvar) < 1e-4
        assert relative_error(decoded[:, :, frame], theirs.decode(latents[:, :, frame]).sample) < 1e-4


@pytest.mark.parametrize("config", [HUNYUAN_VAE, FLUX_VAE, NANO_VIDEO_VAE], ids=["hunyuan", "flux", "nano"])
def test_full_size_keys_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        ours = (HunyuanVAE if config.kind == "hunyuan" else FluxVAE)(config).state_dict()
        theirs = reference(config).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("config", [HUNYUAN_CONFIGS[0], FLUX_CONFIGS[0]], ids=["hunyuan", "flux"])
@torch.no_grad()
def test_encode_is_the_mean_or_a_reproducible_sample(config):
    ours, _ = pair(config, seed=0)
    pixels = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    mean, logvar = ours.moments(pixels)
    sample = ours.encode(pixels, torch.Generator().manual_seed(3))
    assert torch.equal(ours.encode(pixels), mean)
    assert torch.equal(sample, ours.encode(pixels, torch.Generator().manual_seed(3)))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, mean + (0.5 * logvar).exp() * noise)


def test_samples_have_the_posteriors_moments():
    mean, logvar = torch.full((40_000,), 3.0), torch.full((40_000,), 0.25).log()
    sample = sample_posterior(mean, logvar, torch.Generator().manual_seed(0))
    assert sample.mean() == pytest.approx(3.0, abs=0.02)
    assert sample.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("config", "factor"), [(HUNYUAN_VAE, 0.476986), (FLUX_VAE, 0.3611)])
def test_latents_are_scaled_and_not_shifted(config, factor):
    latents = torch.randn(1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scale_latents(torch.zeros(3), config), torch.zeros(3))
    torch.testing.assert_close(scale_latents(latents, config), latents * factor)
    torch.testing.assert_close(unscale_latents(scale_latents(latents, config), config), latents)


def test_frames_and_pixels_convert_both_ways():
    frames = torch.rand(2, 3, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    pixels = frames_to_pixels(frames)
    assert pixels.shape == (2, 3, 3, 4, 5)
    assert pixels[1, 2, 0, 3, 4] == pytest.approx(float(frames[1, 0, 3, 4, 2]) * 2 - 1)
    torch.testing.assert_close(pixels_to_frames(pixels), frames)
    assert pixels_to_frames(torch.tensor([-1.5, 1.5, 0.0]).view(1, 3, 1, 1, 1)).flatten().tolist() == [0.0, 1.0, 0.5]
