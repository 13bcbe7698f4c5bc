"""The language of edits: what can be asked of a picture, and how the sentence is made."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from .language import BACKGROUNDS, COLORS, SHAPES, Scene

KINDS = ("color", "background", "shape", "remove")
_FORMS = {
    "color": "make the {shape} {value}",
    "background": "change the background to {value}",
    "shape": "turn the {shape} into a {value}",
    "remove": "remove the {shape}",
}
_LOOSE_FORMS = {
    "color": ("make the {shape} {value}", "change the {shape} to {value}", "make {shape} {value}"),
    "background": ("change the background to {value}", "make the background {value}", "change background to {value}"),
    "shape": ("turn the {shape} into a {value}", "change the {shape} into a {value}", "turn {shape} into {value}"),
    "remove": ("remove the {shape}", "remove {shape}"),
}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of a scene."""

    kind: str
    """Of `KINDS`."""
    shape: str
    """The shape in the picture."""
    value: str | None = None
    """The new colour, background or shape; None for 'remove'."""


def random_edit(scene: Scene, rng: random.Random) -> Edit:
    """A change that is one: the new value differs from the old."""
    kind = rng.choice(KINDS)
    if kind == "remove":
        return Edit(kind=kind, shape=scene.shape)
    known = {"color": tuple(COLORS), "background": tuple(BACKGROUNDS), "shape": SHAPES}[kind]
    others = [value for value in known if value != getattr(scene, kind)]
    return Edit(kind=kind, shape=scene.shape, value=rng.choice(others))


def apply(scene: Scene, edit: Edit) -> Scene:
    """What the picture shows afterwards."""
    if edit.kind == "remove":
        return replace(scene, shape=None)
    return replace(scene, **{edit.kind: edit.value})


def instruction(edit: Edit) -> str:
    """The canonical sentence."""
    return _FORMS[edit.kind].format(shape=edit.shape, value=edit.value)


def varied_instruction(edit: Edit, rng: random.Random) -> str:
    """The same as a person might type it; half of the time the canonical sentence."""
    form = _FORMS[edit.kind] if rng.random() < 0.5 else rng.choice(_LOOSE_FORMS[edit.kind])
    text = form.format(shape=edit.shape, value=edit.value)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + rng.choice(["", "", "", "."])


def parse_edit(text: str) -> Edit:
    """The edit that a sentence asks for.

    Raises:
        ValueError: the sentence is none of the language's four.
    """
    words = re.findall(r"[a-z]+", text.lower())
    shapes = [word for word in words if word in SHAPES]
    colors = [word for word in words if word in COLORS]
    grounds = [word for word in words if word in BACKGROUNDS]
    if "remove" in words and len(shapes) == 1:
        return Edit(kind="remove", shape=shapes[0])
    if "background" in words and len(grounds) == 1:
        return Edit(kind="background", shape=SHAPES[0], value=grounds[0])
    if len(shapes) == 2:
        return Edit(kind="shape", shape=shapes[0], value=shapes[1])
    if len(shapes) == 1 and len(colors) == 1:
        return Edit(kind="color", shape=shapes[0], value=colors[0])
    raise ValueError(
        f"'{text}' is no edit of the Nano language; say 'make the circle red', 'change the background to navy', "
        "'turn the circle into a square' or 'remove the circle'"
    )
