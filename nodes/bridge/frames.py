"""LATENT and held frames for a variant: sizes, keyframes, the end of a clip that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import node_helpers
import torch
from torch import Tensor

from ...kandinsky5_core.canvas import check_side, cover
from ...kandinsky5_core.clips import join as join_clips
from ...kandinsky5_core.conditioning import ImageConditioning
from ...kandinsky5_core.config import Variant
from ...kandinsky5_core.inputs import encode_keyframes, held_latents
from ...kandinsky5_core.request import keyframe_positions
from ...kandinsky5_core.shapes import LatentShape, VideoShape, size_from_image
from .latent_format import matches
from .model import variant_of
from .vae import K5VAE

__all__ = ["GivenFrames", "empty_latent", "fitted", "join_clips", "keyframe_list", "require_variant", "with_given"]


def require_variant(model: Any) -> Variant:
    """The variant of a MODEL.

    Raises:
        ValueError: it was not loaded by this pack.
    """
    found = variant_of(model)
    if found is None:
        raise ValueError("model is no Kandinsky 5 MODEL of 'Load Kandinsky 5 Model'; load it with that node")
    return found


def latent_shape(variant: Variant, height: int, width: int, frames: int, batch: int) -> LatentShape:
    """Of LATENT; zeros mean the variant's own.

    Raises:
        ValueError: a size or length that the variant cannot take.
    """
    if (height == 0) != (width == 0):
        raise ValueError(f"width {width} and height {height}: give both, or 0 for both")
    height, width = (height, width) if height else variant.resolutions[0]
    check_side(height, width)
    frames = frames or variant.num_frames
    if variant.vae.kind == "flux" and frames != 1:
        raise ValueError(f"frames {frames}: {variant.name} makes pictures; use 0 or 1, or load a video model")
    return VideoShape(batch, frames, height, width).latent_shape(variant.vae)


def empty_latent(variant: Variant, height: int, width: int, frames: int, batch: int) -> dict[str, Any]:
    """Zeros: (B, 16, T, h, w) for video, (B, 16, h, w) for pictures."""
    shape = latent_shape(variant, height, width, frames, batch)
    samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
    return {"samples": samples if variant.vae.kind == "hunyuan" else samples[:, :, 0]}


def keyframe_list(
    start: Tensor | None, end: Tensor | None, pictures: Tensor | None, positions: str, *, loop: bool = False
) -> dict[int, Tensor]:
    """Pictures (H, W, 3) by frame; negative frames count from the end.

    Raises:
        ValueError: positions and pictures do not fit, or one frame is given twice.
    """
    given: dict[int, Tensor] = {}
    numbers = [part.strip() for part in positions.split(",") if part.strip()]
    if not all(number.removeprefix("-").isdigit() for number in numbers):
        raise ValueError(f"keyframe_positions '{positions}' must be frame numbers with commas, such as 0, 60, -1")
    if len(numbers) != (0 if pictures is None else len(pictures)):
        count = 0 if pictures is None else len(pictures)
        raise ValueError(f"keyframe_positions names {len(numbers)} frames and keyframes holds {count} pictures")
    wanted = [(int(number), picture) for number, picture in zip(numbers, pictures if numbers else [], strict=True)]
    wanted += [(0, start[0])] if start is not None else []
    wanted += [(-1, end[0])] if end is not None else []
    for frame, picture in wanted:
        if frame in given:
            raise ValueError(f"frame {frame} is given twice; leave one of the pictures out")
        given[frame] = picture[..., :3]
    if loop:
        if 0 not in given or -1 in given:
            raise ValueError("loop needs a start image and no end image: it ends on the start image")
        given[-1] = given[0]
    if not given:
        raise ValueError("no picture is given; connect start_image, end_image or keyframes")
    return given


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """Clean latents that the model holds."""

    held: ImageConditioning
    """Its latents are unscaled, as LATENT holds them."""

    @classmethod
    def of_pictures(
        cls, variant: Variant, vae: K5VAE, given: Mapping[int, Tensor], height: int, width: int, frames: int
    ) -> GivenFrames:
        """Pictures at their frames, as in the core's `frame_conditioning`."""
        check_video(variant, vae)
        if not height and not width:
            first = given[min(given, key=lambda frame: (frame < 0, frame))]
            height, width = size_from_image(
                *first.shape[:2], max_area=variant.max_area, multiple=variant.image_size_multiple
            )
        frames = frames or variant.num_frames
        shape = latent_shape(variant, height, width, frames, 1)
        group = variant.vae.temporal_ratio
        placed = keyframe_positions(given, frames, group)
        latents = encode_keyframes(placed, group, lambda still: vae.encode(fitted(still, (height, width))).float())
        return cls(held=held_latents(latents, shape))

    @classmethod
    def of_clip(cls, variant: Variant, vae: K5VAE, clip: Tensor, overlap: int, frames: int) -> GivenFrames:
        """The last frames of a clip as the first latent frames."""
        check_video(variant, vae)
        group = variant.vae.temporal_ratio
        if (overlap - 1) % group or overlap > len(clip):
            raise ValueError(f"overlap {overlap} must be 4k+1 and at most the clip's {len(clip)} frames")
        frames = frames or variant.num_frames
        if frames <= overlap:
            raise ValueError(f"frames {frames} leaves nothing new after an overlap of {overlap}; use more")
        height, width = size_from_image(
            *clip.shape[1:3], max_area=variant.max_area, multiple=variant.image_size_multiple
        )
        shape = latent_shape(variant, height, width, frames, 1)
        encoded = vae.encode(fitted(clip[-overlap:, ..., :3], (height, width)))
        return cls(held=held_latents(dict(enumerate(encoded.float().unbind(2))), shape))

    def empty(self, batch: int) -> dict[str, Any]:
        """A LATENT of this size."""
        return {"samples": torch.zeros((batch, *self.held.clean.shape[1:]))}


def with_given(given: GivenFrames, *conditionings: Any) -> list[Any]:
    """The conditionings, each with the held frames."""
    values = {"k5_clean": given.held.clean, "k5_given": given.held.mask}
    return [node_helpers.conditioning_set_values(conditioning, values) for conditioning in conditionings]


def fitted(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (F, H, W, 3) that cover a size, cropped to their centre."""
    return cover(tuple(frames.shape[1:3]), size).to_work(frames.float())


def check_video(variant: Variant, vae: Any) -> None:
    """That variant and VAE make video together.

    Raises:
        ValueError: one of them is for pictures.
    """
    if "i2v" not in variant.tasks:
        raise ValueError(f"{variant.name} holds no given frames; load an image to video (i2v) checkpoint")
    check_vae(variant, vae)


def check_vae(variant: Variant, vae: Any) -> None:
    """That a VAE is of the variant's kind; other packs' VAEs are judged by their dimensions.

    Raises:
        ValueError: it is of the other kind.
    """
    wanted = variant.vae.kind
    fits = (
        matches(vae.config, variant) if isinstance(vae, K5VAE) else vae.latent_dim == (3 if wanted == "hunyuan" else 2)
    )
    if not fits:
        name = {"hunyuan": "the HunyuanVideo VAE (hunyuan_video_vae)", "flux": "the FLUX VAE (ae)"}[wanted]
        raise ValueError(f"vae is not for {variant.name}; load {name}")
