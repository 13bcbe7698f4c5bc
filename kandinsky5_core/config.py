"""Model configurations, and one row per released Kandinsky 5.0 checkpoint.

Sizes, defaults and file names follow the configurations and model cards of the official release.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


def config_from_dict(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a frozen config from plain values (JSON lists become tuples); an unknown key is an error.

    Raises:
        ValueError: a key is unknown (the nearest valid name is given) or a required one is missing.
    """
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; valid keys are {', '.join(names)}"
            raise ValueError(f"{config_class.__name__} has no key '{key}'{hint}")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return config_class(**plain)
    except TypeError as error:
        raise ValueError(f"{config_class.__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of one CrossDiT (report section 5.2)."""

    model_dim: int
    """Width of the token stream."""
    ff_dim: int
    """Width inside the feed-forward layers."""
    time_dim: int
    """Width of the timestep embedding that drives all modulation."""
    num_text_blocks: int
    num_visual_blocks: int
    axes_dims: tuple[int, int, int]
    """Head dimensions given to the (t, h, w) axes of the 3-D rotary embedding; their sum is head_dim."""
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    """Width of the Qwen2.5-VL hidden states."""
    in_text_dim2: int = 768
    """Width of the pooled CLIP vector."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    visual_cond: bool = True
    """The patch embedding also takes conditioning latents and a mask: 2*in_visual_dim + 1 channels."""

    def __post_init__(self) -> None:
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"model_dim {self.model_dim} is not a multiple of head_dim {self.head_dim} (sum of axes_dims)"
            )
        if any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims {self.axes_dims} must be even: rotary embedding works on pairs")

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def input_channels(self) -> int:
        """Latent channels the patch embedding reads: noisy latents [+ source latents + mask]."""
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim


BLOCK_SIDE = 8
"""Tokens along h and along w of one token block of NABLA."""
BLOCK_TOKENS = BLOCK_SIDE * BLOCK_SIDE
GUIDANCE_OFF = 1e-6
"""|guidance_scale - 1| up to this means no negative pass."""


@dataclass(frozen=True, kw_only=True)
class NablaConfig:
    """Neighborhood-adaptive block-level attention (report section 5.4)."""

    mass: float
    """Kept probability per row of the pooled attention map, in (0, 1] (upstream `P`)."""
    window: tuple[int, int, int] = (11, 3, 3)
    """Always-attended neighbourhood in token blocks (frames, height, width), odd, centred (upstream wT, wH, wW)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"NABLA mass must be in (0, 1], got {self.mass}")
        if any(size < 1 or size % 2 == 0 for size in self.window):
            raise ValueError(f"NABLA window sizes must be odd and positive, got {self.window}")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """One autoencoder: the 3-D causal HunyuanVideo class or the 2-D FLUX class."""

    kind: str
    """'hunyuan' (video, causal in time) or 'flux' (images)."""
    scaling_factor: float
    """Latents for the DiT are VAE latents times this; Kandinsky 5 applies no shift with either VAE."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    temporal_ratio: int = 4
    """Pixel frames per latent frame after the first; 1 for images."""

    def __post_init__(self) -> None:
        if self.kind not in ("hunyuan", "flux"):
            raise ValueError(f"VAE kind must be 'hunyuan' or 'flux', got '{self.kind}'")

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a checkpoint was made to be sampled with."""

    num_steps: int
    guidance_scale: float
    shift: float
    """Warp of the sigma schedule (upstream `scheduler_scale`)."""
    negative_prompt: str = ""
    cache_threshold: float = 0.12
    cache_retain: float = 0.2
    """Of the step cache: official for the released checkpoints, found on two hundred clips or pictures for Nano."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One released checkpoint in one of its uses: what it is and the settings it was trained for."""

    name: str
    family: str
    """'Video Lite', 'Video Pro', 'Image Lite', 'Image Editing' or 'Nano Video'."""
    tasks: tuple[str, ...]
    """Of 't2v', 'i2v', 't2i', 'i2i'; the first is the main one."""
    dit: DiTConfig
    vae: VAEConfig
    sampling: SamplingDefaults
    resolutions: tuple[tuple[int, int], ...]
    """(height, width) in pixels; the first is the default."""
    num_frames: int
    """Default pixel frames, 4k+1; 1 for images."""
    rope_scale: tuple[float, float, float]
    """Divides the (t, h, w) rotary angles."""
    max_text_tokens: int
    """Qwen tokens kept after the template is cropped away."""
    nabla: NablaConfig | None = None
    """None where the checkpoint was trained with dense attention."""
    fps: int = 24
    files: tuple[str, ...] = ()
    """File names under `model/` of the official repository, without `.safetensors`."""
    repo: str = ""
    """Repository of the official single file."""
    max_area: int = 512 * 768
    """Pixels of one frame when the size is taken from an input image."""
    image_size_multiple: int = 16
    """What image-derived sizes are rounded to, in pixels."""


VIDEO_NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
RESOLUTIONS_512 = ((512, 768), (768, 512), (512, 512))
RESOLUTIONS_1024 = (
    (1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896),
)  # fmt: skip

HUNYUAN_VAE = VAEConfig(kind="hunyuan", scaling_factor=0.476986)
FLUX_VAE = VAEConfig(kind="flux", scaling_factor=0.3611, temporal_ratio=1)

VIDEO_LITE = DiTConfig(
    model_dim=1792, ff_dim=7168, time_dim=512, num_text_blocks=2, num_visual_blocks=32, axes_dims=(16, 24, 24)
)
VIDEO_PRO = DiTConfig(
    model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60, axes_dims=(32, 48, 48)
)
IMAGE_EDITING = DiTConfig(
    model_dim=2560, ff_dim=10240, time_dim=512, num_text_blocks=2, num_visual_blocks=50, axes_dims=(32, 48, 48)
)
IMAGE_LITE = dataclasses.replace(IMAGE_EDITING, visual_cond=False)

NANO_VIDEO = DiTConfig(
    model_dim=192, ff_dim=768, time_dim=96, num_text_blocks=1, num_visual_blocks=5, axes_dims=(8, 12, 12),
    in_text_dim=128, in_text_dim2=64,
)  # fmt: skip
NANO_VIDEO_VAE = VAEConfig(
    kind="hunyuan", scaling_factor=0.5, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4
)
NANO_EDIT = dataclasses.replace(NANO_VIDEO, num_visual_blocks=4)
NANO_IMAGE = dataclasses.replace(NANO_EDIT, visual_cond=False)
NANO_IMAGE_VAE = VAEConfig(
    kind="flux", scaling_factor=0.3611, temporal_ratio=1, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
    norm_num_groups=4,
)  # fmt: skip
NANO_SAMPLING = SamplingDefaults(num_steps=20, guidance_scale=3.0, shift=3.0)
NANO_IMAGE_SIZES = ((64, 64), (64, 96), (96, 64), (96, 96))


def _video(
    name: str, dit: DiTConfig, *, file: str, seconds: int, size: int = 512, mass: float | None = None, steps: int = 50,
    guidance: float = 5.0, shift: float, tasks: tuple[str, ...] = ("t2v", "t2i"),
) -> Variant:  # fmt: skip
    high_definition = size == 1024
    # RESOLUTIONS_1024 starts with the square; wide is what people film, so HD video starts with 768x1280.
    hd_sizes = tuple(sorted(RESOLUTIONS_1024, key=lambda hw: hw != (768, 1280)))
    kind = "I2V" if "i2v" in tasks else "T2V"
    tier = "Pro" if dit is VIDEO_PRO else "Lite"
    stage = file.split(f"kandinsky5{tier.lower()}_{kind.lower()}_")[1]
    return Variant(
        name=name, family=f"Video {tier}", tasks=tasks, dit=dit, vae=HUNYUAN_VAE,
        sampling=SamplingDefaults(num_steps=steps, guidance_scale=guidance, shift=shift,
                                  negative_prompt=VIDEO_NEGATIVE_PROMPT),
        resolutions=hd_sizes if high_definition else RESOLUTIONS_512,
        num_frames=seconds * 24 // 4 * 4 + 1,
        rope_scale=(1.0, 3.16, 3.16) if high_definition else (1.0, 2.0, 2.0),
        max_text_tokens=256,
        nabla=NablaConfig(mass=mass) if mass is not None else None,
        files=(file,), repo=f"kandinskylab/Kandinsky-5.0-{kind}-{tier}-{stage.replace('_', '-')}",
        max_area=1024 * 1024 if high_definition else 512 * 768,
        image_size_multiple=128 if high_definition else 16,
    )  # fmt: skip


def _image(name: str, dit: DiTConfig, *, file: str, repo: str, tasks: tuple[str, ...], family: str) -> Variant:
    return Variant(
        name=name, family=family, tasks=tasks, dit=dit, vae=FLUX_VAE,
        sampling=SamplingDefaults(num_steps=50, guidance_scale=3.5, shift=3.0),
        resolutions=RESOLUTIONS_1024, num_frames=1, rope_scale=(1.0, 1.0, 1.0), max_text_tokens=512,
        files=(file,), repo=repo, max_area=1024 * 1024,
    )  # fmt: skip


def _nano_image(
    name: str, dit: DiTConfig, *, tasks: tuple[str, ...], family: str, sampling: SamplingDefaults = NANO_SAMPLING
) -> Variant:
    return Variant(
        name=name, family=family, tasks=tasks, dit=dit, vae=NANO_IMAGE_VAE,
        sampling=sampling,
        resolutions=NANO_IMAGE_SIZES, num_frames=1, rope_scale=(1.0, 1.0, 1.0), max_text_tokens=512, max_area=64 * 64,
    )  # fmt: skip


_I2V = ("i2v", "t2v", "t2i")
_ROWS = (
    _video("lite-t2v-5s-sft", VIDEO_LITE, file="kandinsky5lite_t2v_sft_5s", seconds=5, shift=5.0),
    _video("lite-t2v-5s-pretrain", VIDEO_LITE, file="kandinsky5lite_t2v_pretrain_5s", seconds=5, shift=5.0),
    _video("lite-t2v-5s-nocfg", VIDEO_LITE, file="kandinsky5lite_t2v_nocfg_5s", seconds=5, shift=5.0, guidance=1.0),
    _video("lite-t2v-5s-flash", VIDEO_LITE, file="kandinsky5lite_t2v_distilled16steps_5s", seconds=5, shift=5.0,
           steps=16, guidance=1.0),
    _video("lite-t2v-10s-sft", VIDEO_LITE, file="kandinsky5lite_t2v_sft_10s", seconds=10, shift=10.0, mass=0.9),
    _video("lite-t2v-10s-pretrain", VIDEO_LITE, file="kandinsky5lite_t2v_pretrain_10s", seconds=10, shift=10.0,
           mass=0.9),
    _video("lite-t2v-10s-nocfg", VIDEO_LITE, file="kandinsky5lite_t2v_nocfg_10s", seconds=10, shift=10.0, mass=0.9,
           guidance=1.0),
    _video("lite-t2v-10s-flash", VIDEO_LITE, file="kandinsky5lite_t2v_distilled16steps_10s", seconds=10, shift=10.0,
           mass=0.9, steps=16, guidance=1.0),
    _video("lite-i2v-5s", VIDEO_LITE, file="kandinsky5lite_i2v_5s", seconds=5, shift=10.0, tasks=_I2V),
    _video("pro-t2v-5s-sft", VIDEO_PRO, file="kandinsky5pro_t2v_sft_5s", seconds=5, shift=5.0),
    _video("pro-t2v-5s-sft-hd", VIDEO_PRO, file="kandinsky5pro_t2v_sft_5s", seconds=5, shift=5.0, size=1024, mass=0.8),
    _video("pro-t2v-10s-sft", VIDEO_PRO, file="kandinsky5pro_t2v_sft_10s", seconds=10, shift=10.0, mass=0.9),
    _video("pro-t2v-10s-sft-hd", VIDEO_PRO, file="kandinsky5pro_t2v_sft_10s", seconds=10, shift=10.0, size=1024,
           mass=0.7),
    _video("pro-t2v-5s-pretrain", VIDEO_PRO, file="kandinsky5pro_t2v_pretrain_5s", seconds=5, shift=5.0),
    _video("pro-t2v-10s-pretrain", VIDEO_PRO, file="kandinsky5pro_t2v_pretrain_10s", seconds=10, shift=10.0, mass=0.9),
    _video("pro-i2v-5s-sft", VIDEO_PRO, file="kandinsky5pro_i2v_sft_5s", seconds=5, shift=10.0, tasks=_I2V),
    _video("pro-i2v-5s-sft-hd", VIDEO_PRO, file="kandinsky5pro_i2v_sft_5s", seconds=5, shift=5.0, size=1024, mass=0.8,
           tasks=_I2V),
    _video("pro-t2v-5s-flash", VIDEO_PRO, file="kandinsky5pro_t2v_distilled_5s", seconds=5, shift=5.0, steps=16,
           guidance=1.0),
    _video("pro-i2v-5s-flash", VIDEO_PRO, file="kandinsky5pro_i2v_distilled_5s", seconds=5, shift=5.0, steps=16,
           guidance=1.0, tasks=_I2V),
    _image("image-lite-t2i-sft", IMAGE_LITE, file="kandinsky5lite_t2i", repo="kandinskylab/Kandinsky-5.0-T2I-Lite",
           tasks=("t2i",), family="Image Lite"),
    _image("image-lite-t2i-pretrain", IMAGE_LITE, file="kandinsky5lite_t2i_pretrain",
           repo="kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain", tasks=("t2i",), family="Image Lite"),
    _image("image-lite-i2i-sft", IMAGE_EDITING, file="kandinsky5lite_i2i", repo="kandinskylab/Kandinsky-5.0-I2I-Lite",
           tasks=("i2i", "t2i"), family="Image Editing"),
    _image("image-lite-i2i-pretrain", IMAGE_EDITING, file="kandinsky5lite_i2i_pretrain",
           repo="kandinskylab/Kandinsky-5.0-I2I-Lite-pretrain", tasks=("i2i", "t2i"), family="Image Editing"),
    Variant(
        name="nano-video", family="Nano Video", tasks=("t2v", "i2v", "t2i"), dit=NANO_VIDEO, vae=NANO_VIDEO_VAE,
        sampling=dataclasses.replace(NANO_SAMPLING, cache_threshold=0.03),
        resolutions=((64, 64),), num_frames=17, rope_scale=(1.0, 1.0, 1.0), max_text_tokens=256, fps=8,
        max_area=64 * 64,
    ),
    _nano_image("nano-image", NANO_IMAGE, tasks=("t2i",), family="Nano Image",
                sampling=dataclasses.replace(NANO_SAMPLING, cache_threshold=0.06, cache_retain=0.35)),
    _nano_image("nano-edit", NANO_EDIT, tasks=("i2i", "t2i"), family="Nano Edit"),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
"""Every released checkpoint and the embedded Nano models, by name."""


def variant(name: str) -> Variant:
    """The row of `VARIANTS` called `name`.

    Raises:
        ValueError: no such row; the nearest names are given.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.3)
        raise ValueError(f"unknown model variant '{name}'; nearest: {', '.join(near)}; all: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def variant_for_size(row: Variant, height: int, width: int) -> Variant:
    """Of the rows that share `row`'s checkpoint (SD and HD), the one made for frames of about this area."""
    siblings = [other for other in VARIANTS.values() if other.files and other.files == row.files]
    area = max(1, height * width)
    return min(siblings or [row], key=lambda other: max(area, other.max_area) / min(area, other.max_area))
