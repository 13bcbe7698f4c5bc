"""Given pictures for editing and inpainting, on ComfyUI's sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import node_helpers
import torch
from torch import Tensor

from ...kandinsky5_core.canvas import Canvas, check_ratio, check_side, cover, extend_edges, keep, kept_size
from ...kandinsky5_core.config import Variant
from ...kandinsky5_core.inputs import outpaint_overlap
from ...kandinsky5_core.masks import check_mask, composite, latent_mask, repainted
from ...kandinsky5_core.shapes import nearest_resolution
from .frames import check_vae


def kept_canvas(variant: Variant, size: tuple[int, int]) -> Canvas:
    """The whole picture on a frame that the variant can take."""
    check_ratio(*size)
    largest = max(height * width for height, width in variant.resolutions)
    work = kept_size(*size, max_area=variant.max_area, largest_area=largest, multiple=2 * variant.vae.spatial_ratio)
    check_side(*work)
    return keep(size, work)


@dataclass(frozen=True, kw_only=True)
class EditInputs:
    """A picture to edit, and a LATENT to make the result in."""

    shown: Tensor
    """(1, H, W, 3) of the model's frame."""
    source: Tensor
    """(1, 16, h, w) unscaled."""
    latent: dict[str, Any]

    def with_source(self, *conditionings: Any) -> list[Any]:
        """The conditionings, each with the source channels."""
        values = {"k5_source": self.source}
        return [node_helpers.conditioning_set_values(conditioning, values) for conditioning in conditionings]


def edit_inputs(variant: Variant, vae: Any, image: Tensor, fit: str, batch: int) -> EditInputs:
    """The picture covered or kept, and encoded.

    Raises:
        ValueError: the model does not edit, the VAE is of the other kind, or the picture is too long.
    """
    if "i2i" not in variant.tasks:
        raise ValueError(f"{variant.name} does not edit; load an Image Editing (i2i) checkpoint")
    check_vae(variant, vae)
    size = tuple(image.shape[1:3])
    check_ratio(*size)
    canvas = (
        kept_canvas(variant, size) if fit == "keep" else cover(size, nearest_resolution(*size, variant.resolutions))
    )
    shown = canvas.to_work(image[:1, ..., :3].float()).clamp(0, 1)
    source = vae.encode(shown)
    source = source[:, :, 0] if source.ndim == 5 else source
    return EditInputs(shown=shown, source=source, latent={"samples": torch.zeros((batch, *source.shape[1:]))})


@dataclass(frozen=True, kw_only=True)
class InpaintInputs:
    """A LATENT with its noise mask, and what to paste back."""

    latent: dict[str, Any]
    base: Tensor
    alpha: Tensor


def inpaint_inputs(
    variant: Variant,
    vae: Any,
    image: Tensor,
    mask: Tensor | None,
    *,
    grow: int,
    feather: int,
    outpaint: tuple[int, int, int, int],
) -> InpaintInputs:
    """As the core's `encode_inputs` does for masks.

    Raises:
        ValueError: nothing to repaint, a mask of another size or number of frames.
    """
    check_vae(variant, vae)
    if mask is None and not any(outpaint):
        raise ValueError("nothing to repaint: connect a mask, or set left, top, right or bottom")
    frames = image[..., :3].float()
    video = variant.vae.kind == "hunyuan"
    group = variant.vae.temporal_ratio
    frames = frames[: (len(frames) - 1) // group * group + 1] if video else frames[:1]
    size = tuple(frames.shape[1:3])
    if mask is not None:
        mask = check_mask(mask[: len(frames)] if mask.ndim == 3 else mask, size, len(frames))
    mask, alpha = repainted(
        mask, size, outpaint=outpaint, overlap=outpaint_overlap(variant), grow_by=grow, feather_by=feather
    )
    base = extend_edges(frames, outpaint)
    canvas = kept_canvas(variant, tuple(base.shape[1:3]))
    latents = vae.encode(canvas.to_work(base))
    noise_mask = latent_mask(canvas.to_work(mask[..., None])[..., 0].clamp(0, 1), variant.vae, len(frames))
    return InpaintInputs(
        latent={"samples": latents, "noise_mask": noise_mask if latents.ndim == 5 else noise_mask[:, 0]},
        base=base,
        alpha=alpha,
    )


def paste_back(image: Tensor, base: Tensor, alpha: Tensor) -> Tensor:
    """(B, H, W, 3): results over their base; bit-exact where alpha is 0.

    Raises:
        ValueError: the mask has another size than the base, or the numbers of frames do not fit.
    """
    if tuple(alpha.shape[1:]) != tuple(base.shape[1:3]):
        raise ValueError(f"alpha is {tuple(alpha.shape[1:])} and base {tuple(base.shape[1:3])}; take both from Inpaint")
    if len(image) % len(base):
        raise ValueError(
            f"image has {len(image)} frames and base {len(base)}; the first must be a multiple of the second"
        )
    canvas = keep(tuple(base.shape[1:3]), tuple(image.shape[1:3]))
    result = canvas.from_work(image[..., :3].float())
    return composite(result.unflatten(0, (-1, len(base))), base, alpha).flatten(0, 1)
