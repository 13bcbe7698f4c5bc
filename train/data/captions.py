"""Captions as the report cleans them (section 3): without the phrases that every captioner begins with."""

from __future__ import annotations

import re

_EN = re.compile(
    r"^(?:in\s+)?(?:this|the|an?)\s+(?:(?:given|following|provided|attached|above|short)\s+)?"
    r"(?:(?:image|picture|photo|photograph|video|clip|video\s+clip|footage)\s*"
    r"(?:shows|showcases|depicts|features|displays|captures|presents|portrays|illustrates|contains|is\s+of|of|,)"
    r"|(?:scene|frame)\s+(?:shows|showcases|depicts|features|displays|captures|presents|portrays))"
    # The comma is no letter, so no word ends behind it.
    r"(?:(?<=,)|\b)\s*(?:us\s+)?(?:we\s+(?:can\s+)?see\s+)?",
    re.IGNORECASE,
)
_RU = re.compile(
    r"^(?:на|в)\s+(?:этом\s+|данном\s+)?"
    r"(?:изображении|картинке|фото|фотографии|снимке|видео|ролике|кадре)\s*,?\s*"
    r"(?:(?:мы\s+)?(?:видим|видно|можно\s+увидеть)|показан[аоы]?|изображ[её]н[аоы]?|представлен[аоы]?|запечатл[её]н[аоы]?)"
    r"\b\s*,?\s*(?:как\s+)?",
    re.IGNORECASE,
)


def clean_caption(text: str, trigger: str = "") -> str:
    """`text` on one line without a common beginning such as "The image shows", and `trigger` before it."""
    text = " ".join(text.split())
    for pattern in (_EN, _RU):
        shorter = pattern.sub("", text, count=1)
        if shorter != text and shorter:
            text = shorter[0].upper() + shorter[1:]
            break
    trigger = trigger.strip()
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text or trigger
    return f"{trigger}, {text}" if text else trigger
