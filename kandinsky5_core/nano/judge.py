"""Marks for what the embedded models made: 1 for right and 0 for wrong, or decibels.

Nothing here is lenient towards the models: every tolerance is the least that drawn answers pass after the blur and
noise of a VAE, and is stated. Lengths are in sides, the shorter of height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edits import Edit, apply
from .language import Scene
from .recognise import MIN_AREA, Sighting, recognise

SAME_PLACE = 0.04
"""Sides that the centre of an unchanged shape may move: 2.6 of 64 pixels, under half of the smallest radius."""
SAME_SIZE = 0.2
"""Share that its radius may change by; the smallest 'big' shape is a third larger than the largest 'small' one."""
SAME_COLOR = 0.15
"""RGB distance, of sqrt(3), of an unchanged colour: under half of that between the language's two nearest."""
JUMP = 1.5
"""A step between frames is a jump beyond this many times the largest step of the drawn clip,"""
UNSTEADY = 0.03
"""or this RMS difference, whichever is more: what the VAE changes in a picture (31 dB)."""

Marks = dict[str, float]


def judge_scene(frames: Tensor, scene: Scene, *, moving: bool) -> Marks:
    """Whether the frames (F, H, W, 3) show the scene, by attribute and in `all`."""
    seen = recognise(frames)
    marks = {name: getattr(seen, name) == getattr(scene, name) for name in ("color", "background", "shape")}
    if moving:
        marks["motion"] = seen.motion == (scene.direction or "still")
    return with_all(marks)


def judge_edit(before: Tensor, after: Tensor, scene: Scene, edit: Edit) -> Marks:
    """Whether the edit of the picture of `scene` was `done`, and whether the `rest` was left alone.

    Args:
        before, after: (H, W, 3).
    """
    old, new = recognise(before[None]), recognise(after[None])
    rest = _unchanged(old, new, apply(scene, edit), edit)
    done = new.is_empty if edit.kind == "remove" else getattr(new, edit.kind) == edit.value
    return {
        **with_all({"done": done, "rest": all(rest.values())}),
        f"done_{edit.kind}": float(done),
        f"rest_{edit.kind}": float(all(rest.values())),
        **{f"same_{name}": float(value) for name, value in rest.items()},
    }


def _unchanged(old: Sighting, new: Sighting, wanted: Scene, edit: Edit) -> dict[str, bool]:
    """Everything that this edit does not name."""
    same: dict[str, bool] = {}
    if edit.kind != "background":
        same["background"] = new.background == wanted.background and _near(old.background_rgb, new.background_rgb)
    if edit.kind == "remove":
        return same
    if edit.kind != "color":
        same["color"] = new.color == wanted.color and _near(old.color_rgb, new.color_rgb)
    if edit.kind != "shape":
        same["shape"] = new.shape == wanted.shape
    same["place"] = bool(new.path) and math.dist(old.path[0], new.path[0]) <= SAME_PLACE
    same["size"] = bool(old.radius and new.radius) and abs(new.radius / old.radius - 1) <= SAME_SIZE
    same["clean"] = bool(new.path) and new.stray_area < MIN_AREA
    return same


def _near(old: tuple[float, ...], new: tuple[float, ...]) -> bool:
    return len(old) == len(new) and math.dist(old, new) <= SAME_COLOR


def judge_outside(made: Tensor, given: Tensor, mask: Tensor) -> float:
    """1 where every pixel of `given` (H, W, 3) that the mask leaves out is in `made`, bit by bit."""
    return float(made.shape == given.shape and torch.equal(made[mask == 0], given[mask == 0]))


def judge_extension(made: Tensor, clip: Tensor, overlap: int, scene: Scene) -> Marks:
    """Whether `made` begins with `clip` and goes on with the same scene, without a jump.

    Args:
        made: (F', H, W, 3).
        clip: (F, H, W, 3) drawn.
        overlap: Last frames of the clip over which one was faded into the other.
    """
    begins = len(made) > len(clip) and torch.equal(made[: len(clip) - overlap], clip[: len(clip) - overlap])
    limit = max(JUMP * float(steps(clip).max()), UNSTEADY)
    joint = steps(made[len(clip) - overlap - 1 : len(clip) + 1])
    marks = judge_scene(made[len(clip) :], scene, moving=True)
    marks.pop("all")
    return {
        **with_all({**{name: bool(value) for name, value in marks.items()}, "no_jump": float(joint.max()) <= limit}),
        "begins_identical": float(begins),
        "overlap_psnr": psnr(made[len(clip) - overlap : len(clip)], clip[-overlap:]),
    }


def steps(frames: Tensor) -> Tensor:
    """(F-1,) RMS difference of each frame to the next."""
    return (frames[1:] - frames[:-1]).square().mean(dim=(1, 2, 3)).sqrt()


def psnr(made: Tensor, wanted: Tensor) -> float:
    """In dB, for a peak of 1."""
    return float(-10 * torch.log10((made - wanted).square().mean().clamp_min(1e-10)))


def with_all(marks: dict[str, bool]) -> Marks:
    """Marks as numbers, and `all`: whether each is right."""
    return {**{name: float(value) for name, value in marks.items()}, "all": float(all(marks.values()))}
