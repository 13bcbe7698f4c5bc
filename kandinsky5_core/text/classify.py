"""Which of some classes a picture belongs to, asked of Qwen2.5-VL (the report's SFT data)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from .encoder import TextEncoder
from .enhancer import FIRST_FRAME_AREA, PROMPTS, SYSTEM, written
from .templates import IMAGE_MARK
from .vision import limit_area, to_pil

DOMAINS = ("animals", "architecture", "art", "cartoons", "food", "interiors", "nature", "people", "tech", "other")
"""The nine domains of the report, and the rest."""
OTHER = "other"
MAX_ANSWER = 16
"""Tokens; a class is one or two."""
MEDIA = ("image", "video")


@torch.no_grad()
def ask_class(
    encoder: TextEncoder, image: torch.Tensor, *, classes: Sequence[str] = DOMAINS, media: str = "image", **options: Any
) -> str:
    """What Qwen answers, as it stands.

    Args:
        encoder: loaded with `lm_head=True` and a vision tower.
        image: (H, W, 3) floats in 0..1 or uint8; of a video one of its frames.
        options: for `enhancer.written`.

    Raises:
        ValueError: the encoder cannot see or write, or `media` is unknown.
    """
    check_sees_and_writes(encoder)
    picture = limit_area(to_pil(image), FIRST_FRAME_AREA)
    return written(encoder, encoder.vision_inputs(class_prompt(classes, media), [picture]), MAX_ANSWER, **options)


def check_sees_and_writes(encoder: TextEncoder) -> None:
    """Refuse an encoder that cannot look at a picture or answer.

    Raises:
        ValueError: says what it lacks.
    """
    if encoder.qwen.lm_head is None:
        raise ValueError("this text encoder was loaded without its head; load it with lm_head=True to name classes")
    if encoder.qwen.model.visual is None:
        raise ValueError("the loaded Qwen has no vision tower, so it takes no images; load a file that has one")


def class_prompt(classes: Sequence[str], media: str) -> str:
    """The report's request after a picture, in Qwen's chat format.

    Raises:
        ValueError: unknown medium, or no class.
    """
    if media not in MEDIA:
        raise ValueError(f"media '{media}' is unknown; use {' or '.join(MEDIA)}")
    if not classes:
        raise ValueError("classes is empty; give the names to choose from")
    listed = "\n".join(f"{number}) {name}" for number, name in enumerate(classes, 1))
    request = (PROMPTS / "domain.txt").read_text(encoding="utf-8").strip()
    request = request.replace("{media_type}", media).replace("{classes}", listed)
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE_MARK}{request}<|im_end|>\n"
        f"<|im_start|>assistant\n"
    )


def read_class(answer: str, classes: Sequence[str] = DOMAINS) -> str | None:
    """The one class that an answer names, as a word of its own, in singular or plural; None for none or several."""
    text = answer.casefold()
    named = [name for name in classes if re.search(_word(name), text)]
    # A class "pixel art" holds the class "art"; where the longer one is named, that was meant.
    whole = [name for name in named if not any(name != other and re.search(_word(name), other) for other in named)]
    return whole[0] if len(whole) == 1 else None


def _word(name: str) -> str:
    return rf"(?<!\w){re.escape(name.casefold().removesuffix('s'))}s?(?!\w)"
