"""Images on their way into Qwen2.5-VL: bytes, smaller sizes, patches and the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import PIL.Image
    from transformers import PretrainedConfig

MIN_PIXELS = 3136
MAX_PIXELS = 12_845_056
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class QwenImages:
    """Images cut into patches, as the vision tower takes them."""

    pixel_values: torch.Tensor
    """(sum of t*h*w over images, patch values) float32."""
    grid_thw: torch.Tensor
    """(number of images, 3) int64: patches along (t, h, w)."""
    num_tokens: tuple[int, ...]
    """Language-model tokens of each image."""


def to_pil(image: torch.Tensor, *, name: str = "image") -> PIL.Image.Image:
    """The 8-bit image of (H, W, 3) values: floats in 0..1 or uint8.

    Raises:
        ValueError: another shape, dtype or range.
    """
    import PIL.Image

    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {tuple(image.shape)}; expected (height, width, 3)")
    if image.dtype != torch.uint8:
        if not image.is_floating_point() or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{name} is {image.dtype}, not uint8 or floats between 0 and 1; convert it first")
        image = (image.float() * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(image.cpu().contiguous().numpy())


def shrink(image: PIL.Image.Image, divisor: int) -> PIL.Image.Image:
    """At 1/divisor of its width and height (whole pixels, at least one), bicubic."""
    import PIL.Image

    size = max(1, image.width // divisor), max(1, image.height // divisor)
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def limit_area(image: PIL.Image.Image, max_area: int) -> PIL.Image.Image:
    """Unchanged up to `max_area` pixels, else shrunk to about that, keeping its aspect."""
    import PIL.Image

    factor = (max_area / (image.width * image.height)) ** 0.5
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def make_image_processor(vision_config: PretrainedConfig) -> Any:
    """The Qwen2-VL image processor of transformers that needs no torchvision, for this vision tower."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # transformers 4 calls it so
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    return Processor(
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
    )


def prepare_images(processor: Any, images: list[PIL.Image.Image]) -> QwenImages:
    """Patches of the images, each snapped to whole merged patches (28 pixels in the released model)."""
    made = processor(images=images, return_tensors="pt")
    grid = made["image_grid_thw"]
    tokens = grid.prod(dim=1) // processor.merge_size**2
    return QwenImages(pixel_values=made["pixel_values"], grid_thw=grid, num_tokens=tuple(tokens.tolist()))
