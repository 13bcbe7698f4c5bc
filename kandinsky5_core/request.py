"""What to make: the request, its defaults from the variant, and everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .attention.engines import ENGINE_NAMES
from .attention.nabla import resolve_attention
from .canvas import Canvas, check_ratio, check_side, cover, keep, kept_size
from .config import Variant
from .masks import check_mask, grow
from .sampling.guidance_batch import BATCH_CHOICES
from .sampling.samplers import SAMPLERS
from .sampling.schedule import flow_schedule
from .sampling.step_cache import CACHES, MagSettings
from .shapes import VideoShape, nearest_resolution, size_from_image
from .text.templates import EDIT_TEMPLATES
from .vae.tiling import DEFAULT_BUDGET_BYTES

ATTENTIONS = ("auto", "dense", "nabla")
FITS = ("cover", "keep")
NO_OUTPAINT = (0, 0, 0, 0)
OUTPAINT_OVERLAP = 16
"""Pixels of the given picture that are made again beside a new edge, at the released sizes: hides the seam."""
STILL_TASKS = ("t2i", "i2i")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. None means the variant's own default; `settings` shows what that came to.

    Pictures are (H, W, 3) and clips (F, H, W, 3), floats in [0, 1].
    """

    prompt: str
    task: str = "t2v"
    negative_prompt: str | None = None
    image: Tensor | None = None
    """i2v: the first frame. i2i: the picture to edit (without it i2i is t2i). t2i: the picture to start from, with
    `denoise`, `mask` or `outpaint`."""
    video: Tensor | None = None
    """t2v: the clip to start from, with `denoise`, `mask` or `outpaint`; cut to 4k+1 frames."""
    mask: Tensor | None = None
    """(H, W) or (F, H, W) of the given picture or clip: 0 stays, 1 is made anew, greys change less."""
    mask_grow: int = 0
    """Pixels that the mask grows by; negative shrinks it."""
    mask_feather: int = 0
    """Pixels over which new and old are blended beyond the mask's edge and inside it."""
    outpaint: tuple[int, int, int, int] = NO_OUTPAINT
    """Pixels added on the left, top, right and bottom."""
    denoise: float = 1.0
    """How far the given picture or clip is turned to noise before sampling starts; 1 forgets it."""
    fit: str | None = None
    """'cover' scales and crops the given picture to the size of the result, 'keep' keeps all of it, at its own size.
    None: keep where parts of it stay, else cover."""
    keyframes: Mapping[int, Tensor] = field(default_factory=dict)
    """i2v: pictures at frame positions; negative ones count from the end."""
    loop: bool = False
    """t2v and i2v: the clip ends where it began; the repeated last frames are dropped."""
    extend: Tensor | None = None
    """i2v: the clip that goes on; the result begins with it."""
    overlap: int = 5
    """Last frames of that clip, 4k+1, that the model sees."""
    chunks: int = 1
    """How often it goes on, each time by `num_frames` less the overlap."""
    edit_template: str = "snapshot"
    """i2i: a name of `text.templates.EDIT_TEMPLATES`."""
    fps: float | None = None
    """Frames a second of the given clip and of the result; None: the variant's."""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    sampler: str = "euler"
    seed: int = 0
    batch: int = 1
    """Results from one prompt with consecutive seeds."""
    attention: str = "auto"
    attention_engine: str = "auto"
    """What computes dense attention, of `attention.engines.ENGINE_NAMES`; auto takes the fastest exact one."""
    batch_guidance: str = "auto"
    """The positive and the negative pass as one batch: 'on', 'off', or 'auto' (small clips on an accelerator)."""
    cache: str = "off"
    """'magcache' skips steps that change little (`sampling.step_cache`); 'off' computes all."""
    cache_threshold: float | None = None
    cache_max_skip: int = MagSettings.max_skip
    cache_retain: float | None = None
    """As in `MagSettings`."""
    cache_ratios: Path | None = None
    """File of measured ratios; None: the one beside the model, else the released ones."""
    vae_budget_bytes: int = DEFAULT_BUDGET_BYTES
    """Memory that one VAE tile may take; decides the tiling, and with it the result."""

    def cache_settings(self) -> MagSettings:
        """How much the step cache may skip; raises ValueError where a number is out of range."""
        given = {"threshold": self.cache_threshold, "max_skip": self.cache_max_skip, "retain": self.cache_retain}
        return MagSettings(**{name: value for name, value in given.items() if value is not None})

    @property
    def is_partial(self) -> bool:
        """Sampling starts from a given picture or clip, or keeps parts of it."""
        return self.denoise < 1 or self.mask is not None or self.outpaint != NO_OUTPAINT

    @property
    def given(self) -> Tensor | None:
        """What the size comes from, as frames (F, H, W, 3)."""
        if self.extend is not None:
            return self.extend[-1:]
        if self.video is not None:
            return self.video
        if self.image is not None:
            return self.image[None]
        first = min(self.keyframes, key=lambda frame: (frame < 0, frame), default=None)
        return None if first is None else self.keyframes[first][None]

    @property
    def given_size(self) -> tuple[int, int] | None:
        """(height, width) of what is given, with what is painted around it."""
        if self.given is None:
            return None
        left, top, right, bottom = self.outpaint
        height, width = self.given.shape[1:3]
        return height + top + bottom, width + left + right

    def canvas(self) -> Canvas:
        """How the given picture lies on the frame of a resolved request."""
        assert self.given_size is not None and self.height is not None and self.width is not None
        place = keep if self.fit == "keep" else cover
        return place(self.given_size, (self.height, self.width))


def resolve(request: Request, variant: Variant) -> Request:
    """The request with every None filled from the variant, checked before anything is loaded.

    Raises:
        ValueError: names the option, its value and what would do.
    """
    _check_options(request, variant)
    _check_given(request)
    still = request.task in STILL_TASKS
    fit = request.fit or ("keep" if request.is_partial else "cover")
    height, width = _size(replace(request, fit=fit), variant)
    check_side(height, width)
    num_frames = _num_frames(request, variant)
    VideoShape(request.batch, num_frames, height, width).check(variant.vae)
    defaults = variant.sampling
    resolved = replace(
        request, fit=fit, width=width, height=height, num_frames=num_frames,
        video=None if request.video is None else request.video[:num_frames],
        num_steps=_or(request.num_steps, defaults.num_steps),
        guidance_scale=_or(request.guidance_scale, defaults.guidance_scale),
        shift=_or(request.shift, defaults.shift),
        cache_threshold=_or(request.cache_threshold, defaults.cache_threshold),
        cache_retain=_or(request.cache_retain, defaults.cache_retain),
        negative_prompt=_or(request.negative_prompt, "" if still else defaults.negative_prompt),
        keyframes=keyframe_positions(request.keyframes, num_frames, variant.vae.temporal_ratio),
    )  # fmt: skip
    if resolved.mask is not None:
        resolved = replace(resolved, mask=_whole_mask(resolved, request.video))
    if request.loop and any(frame >= num_frames - variant.vae.temporal_ratio for frame in resolved.keyframes):
        raise ValueError("a loop ends on its first picture; leave keyframes in its last four frames out")
    flow_schedule(resolved.num_steps, resolved.shift, resolved.denoise)
    return resolved


def keyframe_positions(keyframes: Mapping[int, Tensor], num_frames: int, group: int = 4) -> dict[int, Tensor]:
    """Keyframes by position from the start, in order.

    Args:
        group: Frames that share a latent frame (after the first, which has its own).

    Raises:
        ValueError: a position outside the clip, or two in one latent frame.
    """
    placed: dict[int, int] = {}
    for position in keyframes:
        frame = position + num_frames if position < 0 else position
        if not 0 <= frame < num_frames:
            raise ValueError(f"keyframe {position} is outside the clip of {num_frames} frames (0 to {num_frames - 1})")
        latent = (frame + group - 1) // group
        taken = [other for other, at in placed.items() if (at + group - 1) // group == latent]
        if taken:
            raise ValueError(
                f"keyframes {taken[0]} and {position} fall into one latent frame; keep them {group} frames apart"
            )
        placed[position] = frame
    return {placed[position]: keyframes[position] for position in sorted(placed, key=placed.__getitem__)}


def settings(request: Request, variant: Variant) -> dict[str, object]:
    """What a resolved request came to, as plain JSON values; of pictures and masks only that they were there."""
    values: dict[str, object] = {}
    always = _ALWAYS if request.cache == "off" else (*_ALWAYS, *_CACHE)
    for entry in dataclasses.fields(request):
        value = getattr(request, entry.name)
        if isinstance(value, Tensor):
            value = list(value.shape)
        elif entry.name == "keyframes":
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        if entry.name in _CACHE and request.cache == "off":
            continue
        if (value != entry.default and value not in ([], None)) or entry.name in always:
            values[entry.name] = list(value) if isinstance(value, tuple) else value
    nabla = resolve_attention(request.attention, variant.nabla)
    used = {"attention": "dense" if nabla is None else f"nabla mass={nabla.mass} window={list(nabla.window)}"}
    used |= {"rope_scale": list(variant.rope_scale), "fps": request.fps or variant.fps}
    return {"variant": variant.name, **values, **used}


_ALWAYS = (
    "prompt", "task", "negative_prompt", "width", "height", "num_frames", "num_steps", "guidance_scale", "shift",
    "sampler", "seed", "batch", "attention", "vae_budget_bytes",
)  # fmt: skip
_CACHE = ("cache_threshold", "cache_max_skip", "cache_retain")
_SHAPES = {3: "(H, W, 3)", 4: "(F, H, W, 3)"}


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _check_options(request: Request, variant: Variant) -> None:
    for name, value, known in (
        ("task", request.task, variant.tasks), ("sampler", request.sampler, tuple(SAMPLERS)),
        ("attention", request.attention, ATTENTIONS), ("fit", request.fit, (None, *FITS)),
        ("edit_template", request.edit_template, tuple(EDIT_TEMPLATES)), ("cache", request.cache, CACHES),
        ("attention_engine", request.attention_engine, ENGINE_NAMES),
        ("batch_guidance", request.batch_guidance, BATCH_CHOICES),
    ):  # fmt: skip
        if value not in known:
            what = f"{name} '{value}'" + (f" with {variant.name}" if name == "task" else "")
            raise ValueError(f"{what} is not possible; use one of {', '.join(filter(None, known))}")
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say what should be seen")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed} is out of range; use 0 to 2^63-1")
    if len(request.outpaint) != 4 or min(request.outpaint) < 0:
        raise ValueError(f"outpaint {request.outpaint} must be four pixel counts from 0: left, top, right, bottom")
    if request.mask_feather < 0:
        raise ValueError(f"mask_feather {request.mask_feather} must be at least 0 pixels")
    if not 0 < request.denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {request.denoise}; 0.4 keeps much, 0.8 little")
    if request.overlap < 1 or (request.overlap - 1) % variant.vae.temporal_ratio:
        raise ValueError(f"overlap {request.overlap} is not of the form 4k+1; use 1, 5 or 9")
    if request.loop and "i2v" not in variant.tasks:
        raise ValueError(f"a loop holds its first and last frame, which {variant.name} cannot; use an i2v checkpoint")
    request.cache_settings()
    if request.chunks < 1:
        raise ValueError(f"chunks {request.chunks} must be at least 1")


def _check_given(request: Request) -> None:
    """That the pictures, clips and masks fit the task and each other."""
    task = request.task
    keyframes = ((f"keyframe {position}", picture, 3) for position, picture in request.keyframes.items())
    clips = (("video", request.video, 4), ("extend", request.extend, 4))
    for name, value, dims in (("image", request.image, 3), *clips, *keyframes):
        if value is not None and (value.ndim != dims or value.shape[-1] != 3 or 0 in value.shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {_SHAPES[dims]}")
    if request.video is not None and task != "t2v":
        raise ValueError(f"task {task} takes no video to start from; use t2v, or extend to go on from a clip")
    if task == "t2v" and request.image is not None:
        raise ValueError("task t2v takes no image; use i2v to start from one, or give a video with denoise or a mask")
    if task == "i2v" and request.is_partial:
        raise ValueError("denoise, mask and outpaint work with t2v on a clip (--video); i2v holds whole frames")
    if task != "i2v" and (request.keyframes or request.extend is not None):
        raise ValueError(f"keyframes and extend are image to video; use task i2v, not {task}")
    if request.loop and task not in ("t2v", "i2v"):
        raise ValueError(f"a loop is a clip; use task t2v or i2v, not {task}")
    if request.extend is not None and (request.image is not None or request.keyframes or request.loop):
        raise ValueError("extend begins with the clip's own last frames; leave image, keyframes and loop out")
    if task == "i2v" and request.given is None:
        raise ValueError("task i2v needs an image: give the first frame (--image FILE) or keyframes (--keyframe)")
    if request.image is not None and 0 in request.keyframes:
        raise ValueError("image and keyframe 0 are both the first frame; give one of them")
    _check_partial(request)


def _check_partial(request: Request) -> None:
    has_start = request.video is not None or (request.image is not None and request.task in STILL_TASKS)
    if request.is_partial and not has_start:
        raise ValueError("denoise, mask and outpaint need something to start from: give --image, or --video for t2v")
    if has_start and not request.is_partial and request.task != "i2i":
        raise ValueError(
            f"task {request.task} starts from a picture or clip only in part: give --denoise below 1, --mask or "
            "--outpaint; or use i2i to edit and i2v to animate"
        )


def _num_frames(request: Request, variant: Variant) -> int:
    group = variant.vae.temporal_ratio
    if request.task in STILL_TASKS:
        if _or(request.num_frames, 1) != 1:
            raise ValueError(f"task {request.task} makes one frame, got frames {request.num_frames}")
        return 1
    if request.video is not None:
        available = (len(request.video) - 1) // group * group + 1
        if request.num_frames is not None and request.num_frames > available:
            raise ValueError(f"frames {request.num_frames} is more than the video gives; use up to {available}")
        return _or(request.num_frames, available)
    num_frames = _or(request.num_frames, variant.num_frames)
    if request.task == "i2v" and num_frames <= group:
        raise ValueError(f"task i2v needs at least {group + 1} frames, got {num_frames}")
    if request.loop and num_frames <= 2 * group:
        raise ValueError(f"a loop needs at least {2 * group + 1} frames, got {num_frames}")
    if request.extend is not None and num_frames <= request.overlap:
        raise ValueError(f"frames {num_frames} leaves nothing new after an overlap of {request.overlap}; use more")
    if request.extend is not None and len(request.extend) < request.overlap:
        raise ValueError(f"the clip to extend has {len(request.extend)} frames, fewer than overlap {request.overlap}")
    return num_frames


def _size(request: Request, variant: Variant) -> tuple[int, int]:
    """(height, width): as asked, else from what is given, else the variant's first resolution."""
    if (request.width is None) != (request.height is None):
        given = "width" if request.height is None else "height"
        raise ValueError(f"only {given} was given; give width and height, or neither")
    if request.width is not None and request.height is not None:
        return request.height, request.width
    if request.given_size is None:
        return variant.resolutions[0]
    check_ratio(*request.given_size)
    multiple = 2 * variant.vae.spatial_ratio
    if request.fit == "keep":
        largest = max(height * width for height, width in variant.resolutions)
        return kept_size(*request.given_size, max_area=variant.max_area, largest_area=largest, multiple=multiple)
    if request.task in STILL_TASKS:
        return nearest_resolution(*request.given_size, variant.resolutions)
    return size_from_image(*request.given_size, max_area=variant.max_area, multiple=variant.image_size_multiple)


def _whole_mask(request: Request, video: Tensor | None) -> Tensor:
    height, width = request.given.shape[1:3]
    mask = request.mask
    if mask.ndim == 3 and video is not None and len(mask) == len(video):
        mask = mask[: request.num_frames]
    mask = check_mask(mask.to(torch.float32), (height, width), request.num_frames)
    if request.mask_grow < 0 and float(grow(mask, request.mask_grow).max()) == 0:
        raise ValueError(f"mask_grow {request.mask_grow} leaves nothing of the mask to repaint; shrink it by less")
    return mask
