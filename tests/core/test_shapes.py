"""Sizes and the rows of released checkpoints."""

import pytest

from kandinsky5_core.config import FLUX_VAE, HUNYUAN_VAE, VARIANTS, variant, variant_for_size
from kandinsky5_core.shapes import LatentShape, VideoShape, nearest_resolution, size_from_image


def test_latent_shapes_of_the_released_durations() -> None:
    assert VideoShape(1, 121, 512, 768).latent_shape(HUNYUAN_VAE) == LatentShape(1, 16, 31, 64, 96)
    assert VideoShape(2, 241, 512, 512).latent_shape(HUNYUAN_VAE) == LatentShape(2, 16, 61, 64, 64)
    assert VideoShape(1, 1, 1024, 1024).latent_shape(FLUX_VAE) == LatentShape(1, 16, 1, 128, 128)


@pytest.mark.parametrize(
    ("frames", "size", "tokens"),
    [(121, (512, 768), 47_616), (241, (512, 768), 93_696), (121, (768, 1280), 119_040), (241, (768, 1280), 234_240)],
)
def test_token_counts(frames: int, size: tuple[int, int], tokens: int) -> None:
    t, h, w = VideoShape(1, frames, *size).latent_shape(HUNYUAN_VAE).token_grid()
    assert t * h * w == tokens


def test_pixels_and_latents_go_both_ways() -> None:
    shape = VideoShape(2, 33, 64, 96)
    assert VideoShape.from_latent(shape.latent_shape(HUNYUAN_VAE), HUNYUAN_VAE) == shape


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (VideoShape(1, 121, 500, 768), "height 500 .* use 496 or 512"),
        (VideoShape(1, 121, 512, 0), "width 0"),
        (VideoShape(1, 120, 512, 768), "frames 120 .* use 117 or 121"),
        (VideoShape(1, 0, 512, 768), "frames 0"),
        (VideoShape(0, 5, 512, 768), "batch 0"),
    ],
)
def test_bad_sizes_name_the_value_and_the_fix(shape: VideoShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape.latent_shape(HUNYUAN_VAE)


def test_size_from_image_keeps_the_area_and_the_ratio() -> None:
    assert size_from_image(1080, 1920, max_area=512 * 768, multiple=16) == (464, 832)
    assert size_from_image(100, 100, max_area=512 * 768, multiple=16) == (624, 624)
    height, width = size_from_image(720, 1280, max_area=1024 * 1024, multiple=128)
    assert (height % 128, width % 128) == (0, 0)


def test_nearest_resolution() -> None:
    assert nearest_resolution(720, 1280, ((1024, 1024), (768, 1280), (640, 1408))) == (768, 1280)


def test_every_released_file_is_a_row() -> None:
    files = {file for row in VARIANTS.values() for file in row.files}
    released = [f"kandinsky5lite_t2v_{stage}_{s}s" for s in (5, 10) for stage in ("sft", "pretrain", "nocfg")]
    released += [f"kandinsky5lite_t2v_distilled16steps_{s}s" for s in (5, 10)]
    released += ["kandinsky5lite_i2v_5s", "kandinsky5lite_t2i", "kandinsky5lite_i2i"]
    released += [f"kandinsky5pro_t2v_{stage}_{s}s" for s in (5, 10) for stage in ("sft", "pretrain")]
    released += ["kandinsky5pro_i2v_sft_5s"]
    assert files >= set(released)


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "shift", "mass", "frames", "scale"),
    [
        ("lite-t2v-5s-sft", 50, 5.0, 5.0, None, 121, 2.0),
        ("lite-t2v-10s-flash", 16, 1.0, 10.0, 0.9, 241, 2.0),
        ("pro-t2v-10s-sft-hd", 50, 5.0, 10.0, 0.7, 241, 3.16),
        ("pro-i2v-5s-sft-hd", 50, 5.0, 5.0, 0.8, 121, 3.16),
        ("image-lite-t2i-sft", 50, 3.5, 3.0, None, 1, 1.0),
    ],
)
def test_rows_hold_the_released_settings(
    name: str, steps: int, guidance: float, shift: float, mass: float | None, frames: int, scale: float
) -> None:
    row = variant(name)
    assert (row.sampling.num_steps, row.sampling.guidance_scale, row.sampling.shift) == (steps, guidance, shift)
    assert (row.nabla.mass if row.nabla else None) == mass
    assert (row.num_frames, row.rope_scale[1]) == (frames, scale)
    for height, width in row.resolutions:
        VideoShape(1, row.num_frames, height, width).check(row.vae)


def test_repositories_follow_the_published_names() -> None:
    assert variant("lite-t2v-10s-flash").repo == "kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-10s"
    assert variant("pro-i2v-5s-sft").repo == "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s"
    assert variant("lite-i2v-5s").repo == "kandinskylab/Kandinsky-5.0-I2V-Lite-5s"


def test_an_unknown_variant_is_answered_with_near_names() -> None:
    with pytest.raises(ValueError, match="lite-t2v-5s-sft"):
        variant("lite-t2v-5s")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("pro-t2v-5s-sft", (768, 1280), "pro-t2v-5s-sft-hd"),
        ("pro-t2v-5s-sft", (512, 768), "pro-t2v-5s-sft"),
        ("pro-i2v-5s-sft-hd", (512, 512), "pro-i2v-5s-sft"),
        ("lite-t2v-5s-sft", (768, 1280), "lite-t2v-5s-sft"),
        ("nano-video", (64, 64), "nano-video"),
    ],
)
def test_the_size_chooses_among_rows_of_one_checkpoint(name: str, size: tuple[int, int], expected: str) -> None:
    assert variant_for_size(variant(name), *size).name == expected
