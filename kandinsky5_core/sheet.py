"""Contact sheets: rows of labelled pictures, to compare results side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .canvas import resize

SHEET_COLUMNS = 5
"""Pictures in a row, where nothing else is said."""
LABEL = 18
"""Height of a line of text, in pixels."""
GAP = 4
"""Pixels between pictures."""


def spread(frames: Tensor, count: int) -> list[Tensor]:
    """`count` frames evenly over a clip (F, H, W, 3), first and last among them; all where it has fewer."""
    count = min(count, len(frames))
    return list(frames[torch.linspace(0, len(frames) - 1, count).round().long()])


def contact_sheet(rows: Sequence[tuple[str, Sequence[Tensor]]], *, cell: int = 128) -> Tensor:
    """(H, W, 3) in [0, 1]: for each row a line of text and its pictures (h, w, 3).

    Args:
        cell: Height of the pictures; their widths follow.

    Raises:
        ValueError: no row, or one without pictures.
    """
    if not rows or not all(pictures for _, pictures in rows):
        raise ValueError("a contact sheet needs rows with at least one picture each")
    widths = [[max(1, cell * picture.shape[1] // picture.shape[0]) for picture in pictures] for _, pictures in rows]
    texts = [math.ceil(ImageFont.load_default().getlength(label)) + 2 * GAP for label, _ in rows]
    across = max(*texts, *(sum(row) + GAP * (len(row) - 1) for row in widths))
    sheet = Image.new("RGB", (across, len(rows) * (cell + LABEL)), "white")
    for number, (label, pictures) in enumerate(rows):
        top, left = number * (cell + LABEL), 0
        ImageDraw.Draw(sheet).text((GAP, top + 3), label, fill="black")
        for picture, width in zip(pictures, widths[number], strict=True):
            pixels = resize(picture[None, ..., :3].float(), (cell, width))[0].clamp(0, 1)
            sheet.paste(Image.fromarray((pixels * 255).round().byte().cpu().numpy()), (left, top + LABEL))
            left += width + GAP
    return torch.from_numpy(np.asarray(sheet).copy()).float() / 255
