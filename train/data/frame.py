"""One picture that stands for an example."""

from __future__ import annotations

from torch import Tensor

from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.media import read_image

from .sources import Example


def middle_frame(example: Example) -> Tensor:
    """(H, W, 3) in [0, 1]: the picture, of an edit the one after it, of a clip the frame in its middle.

    Raises:
        ValueError: it cannot be read.
    """
    if example.kind != "clip":
        return read_image(example.path)
    footage = look_at(example.path)
    return read_frames(footage, (footage.times[-1] / 2,))[0]
