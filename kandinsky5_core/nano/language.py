"""The language of the Nano models: what a prompt can say, and how a sentence is made of it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SIZES = ("small", "big")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (45, 190, 70),
    "blue": (60, 110, 245),
    "yellow": (245, 215, 50),
    "purple": (175, 70, 215),
    "white": (245, 245, 245),
}
TAUGHT_COLORS: dict[str, tuple[int, int, int]] = {"turquoise": (64, 224, 208)}
"""Outside the language, for teaching the models a new colour."""
SHAPES = ("circle", "square", "triangle")
TAUGHT_SHAPES = ("star",)
"""Outside the language, for teaching the models a new shape."""
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (8, 8, 8),
    "gray": (118, 118, 118),
    "navy": (14, 24, 88),
    "brown": (104, 64, 30),
}
"""Names to RGB, 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one clip shows. `size` None leaves it open, `direction` None is at rest, `shape` None is nothing at all."""

    color: str
    shape: str | None
    background: str
    size: str | None = None
    direction: str | None = None


def caption(scene: Scene, *, moving: bool = True) -> str:
    """The canonical sentence; `moving=False` is the still-image form without a verb."""
    subject = " ".join(word for word in (scene.size, scene.color, scene.shape) if word)
    article = f"a {subject}"
    ground = f"on a {scene.background} background"
    if not moving:
        return f"{article} {ground}"
    verb = f"moves {scene.direction}" if scene.direction else "stays still"
    return f"{article} {verb} {ground}"


def varied_caption(scene: Scene, rng: random.Random, *, moving: bool = True) -> str:
    """A sentence for the same scene as a person might type it: without article or size, in another order."""
    words = [scene.size if rng.random() < 0.75 else None, scene.color, scene.shape]
    subject = " ".join(word for word in words if word)
    subject = f"a {subject}" if rng.random() < 0.75 else subject
    article = "a " if rng.random() < 0.75 else ""
    ground = f"on {article}{scene.background} background"
    parts = [subject, ground] if not moving else [subject, _verb(scene, rng), ground]
    if rng.random() < 0.2:
        parts = [ground, *parts[:-1]]
        parts[0] += rng.choice(["", ","])
    elif moving and rng.random() < 0.15:
        parts = [subject, ground, parts[1]]
    text = " ".join(parts)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + rng.choice(["", "", "", "."])


def _verb(scene: Scene, rng: random.Random) -> str:
    if scene.direction is None:
        return rng.choice(["stays still", "stays still", "standing still"])
    return f"{rng.choice(['moves', 'moves', 'moves', 'moving'])} {scene.direction}"


def parse(text: str) -> Scene:
    """The scene that a sentence of the language describes.

    Raises:
        ValueError: a colour, shape or background is missing, with the words that would do.
    """
    words = re.findall(r"[a-z]+", text.lower())
    return Scene(
        size=_find(words, SIZES),
        color=_require(words, tuple(COLORS), "color"),
        shape=_require(words, SHAPES, "shape"),
        direction=_find(words, DIRECTIONS),
        background=_require(words, tuple(BACKGROUNDS), "background"),
    )


def _find(words: list[str], known: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in known), None)


def _require(words: list[str], known: tuple[str, ...], what: str) -> str:
    found = _find(words, known)
    if found is None:
        raise ValueError(f"the prompt '{' '.join(words)}' names no {what}; use one of {', '.join(known)}")
    return found
