"""How a given picture lies on the frame that the model works on, and how the result comes back.

Sizes are (height, width) in pixels, frames (F, H, W, C) floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

MAX_SIDE = 2048
"""128 tokens of 16 pixels: as far as the rotary tables of the released models reach."""
MAX_RATIO = 4
"""Longer to shorter side; the widest that the models know is 2.2."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A picture scaled onto the model's frame; what it lacks is padded at the right and bottom, the rest cropped."""

    source: tuple[int, int]
    """Of the given picture."""
    work: tuple[int, int]
    """Of the model's frame."""
    resized: tuple[int, int]
    """Of the picture on the frame, before cropping or padding."""
    offset: tuple[int, int] = (0, 0)
    """(top, left) of the cut out of the resized picture."""
    covers: bool = False
    """The picture fills the frame and the result stays as large as that; else it comes back at the source's size.
    Said, and not read from the sizes: a picture of the frame's own aspect is covered without a cut."""

    @property
    def result_size(self) -> tuple[int, int]:
        """Of what `from_work` gives."""
        return self.work if self.covers else self.source

    def to_work(self, frames: Tensor) -> Tensor:
        """(F, H, W, C) of the source size on the frame, (F, h, w, C); bit-exact where nothing is scaled."""
        middle = self._middle()
        if middle != self.source:
            top, left = (self.source[0] - middle[0]) // 2, (self.source[1] - middle[1]) // 2
            return cover(middle, self.work).to_work(frames[:, top : top + middle[0], left : left + middle[1]])
        frames = resize(frames, self.resized)
        top, left = self.offset
        frames = frames[:, top : top + self.work[0], left : left + self.work[1]]
        return extend_edges(frames, (0, 0, self.work[1] - frames.shape[2], self.work[0] - frames.shape[1]))

    def _middle(self) -> tuple[int, int]:
        """Of the source's middle that is worth scaling: a line of 1x4000 pixels would fill 47 GiB before its cut."""
        if not self.covers:
            return self.source
        (height, width), (rows, columns) = self.source, self.work
        highest, widest = -(-MAX_RATIO * width * rows // columns), -(-MAX_RATIO * height * columns // rows)
        return min(height, highest), min(width, widest)

    def from_work(self, frames: Tensor) -> Tensor:
        """(F, h, w, C) back at the source's size; a covered frame as it is."""
        if self.covers:
            return frames
        return resize(frames[:, : self.resized[0], : self.resized[1]], self.source)


def cover(source: tuple[int, int], work: tuple[int, int]) -> Canvas:
    """The picture scaled to cover the frame, its centre kept."""
    scale = max(work[0] / source[0], work[1] / source[1])
    resized = max(work[0], round(source[0] * scale)), max(work[1], round(source[1] * scale))
    offset = (resized[0] - work[0]) // 2, (resized[1] - work[1]) // 2
    return Canvas(source=source, work=work, resized=resized, offset=offset, covers=True)


def keep(source: tuple[int, int], work: tuple[int, int]) -> Canvas:
    """The whole picture, scaled to fit inside the frame; never enlarged by less than a whole 16-pixel patch."""
    scale = min(work[0] / source[0], work[1] / source[1])
    if 1 <= scale and work[0] - source[0] < 16 and work[1] - source[1] < 16:
        scale = 1.0  # the frame is the picture rounded up: pad, do not blur
    resized = tuple(min(side, max(1, round(given * scale))) for given, side in zip(source, work, strict=True))
    return Canvas(source=source, work=work, resized=resized)  # type: ignore[arg-type]


def kept_size(height: int, width: int, *, max_area: int, largest_area: int, multiple: int) -> tuple[int, int]:
    """Of the frame for a picture that is kept whole: its own size where the model knows such areas, rounded up.

    Args:
        max_area: Pixels that the model was made for; pictures far from it are scaled to that.
        largest_area: Of the model's resolutions.
    """
    area = height * width
    scale = 1.0 if max_area / 2 <= area <= 1.25 * largest_area else math.sqrt(max_area / area)
    return tuple(math.ceil(max(1, round(side * scale)) / multiple) * multiple for side in (height, width))  # type: ignore[return-value]


def check_ratio(height: int, width: int) -> None:
    """Refuse pictures much longer than anything that the models were trained on.

    Raises:
        ValueError: beyond 4:1.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {width}x{height} is longer than {MAX_RATIO}:1, beyond what the models know; crop it, or "
            "give width and height to have its centre taken"
        )


def check_side(height: int, width: int) -> None:
    """Refuse frames that the models' positions do not reach.

    Raises:
        ValueError: a side above 2048 pixels.
    """
    for name, side in (("width", width), ("height", height)):
        if side > MAX_SIDE:
            raise ValueError(f"{name} {side} is beyond the {MAX_SIDE} pixels that the models' positions reach")


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, H, W, C) at another size, bilinear and anti-aliased; unchanged where it has that size."""
    if tuple(frames.shape[1:3]) == tuple(size):
        return frames
    channels_first = frames.permute(0, 3, 1, 2).float()
    return F.interpolate(channels_first, size=size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def extend_edges(frames: Tensor, outpaint: tuple[int, int, int, int]) -> Tensor:
    """(F, H, W, C) with its edge pixels repeated on the left, top, right and bottom."""
    left, top, right, bottom = outpaint
    if not any(outpaint):
        return frames
    padded = F.pad(frames.permute(0, 3, 1, 2), (left, right, top, bottom), mode="replicate")
    return padded.permute(0, 2, 3, 1)
