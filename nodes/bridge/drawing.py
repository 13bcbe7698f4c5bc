"""Drawn pictures for workflows that need one."""

from __future__ import annotations

import random

from torch import Tensor

from ...kandinsky5_core.nano.drawing import draw, random_trajectory
from ...kandinsky5_core.nano.language import parse


def drawn(sentence: str, height: int, width: int, frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (F, H, W, 3), and a mask (F, H, W) of the shape.

    Raises:
        ValueError: the sentence is not of the Nano language.
    """
    scene = parse(sentence)
    clip = draw(scene, random_trajectory(scene, random.Random(seed), (height, width)), frames, (height, width))
    mask = (clip - clip[:, :1, :1]).abs().amax(dim=-1).gt(0.02).float()
    return clip, mask
