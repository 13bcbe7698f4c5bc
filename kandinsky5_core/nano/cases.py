"""Random tasks for the embedded models, each with its judge: what `score-nano` asks and how it marks the answer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import Variant
from ..request import Request
from .drawing import TRAVEL, draw, random_clip, random_pair, random_scene, random_trajectory
from .edits import Edit, apply, varied_instruction
from .language import Scene, varied_caption
from .recognise import Sighting, recognise

SAME_PLACE = 0.06
"""Sides that the centre of an unchanged shape may move by."""
SAME_EXTENT = 0.25
"""Share by which its extent may change: the shapes of one size differ by a tenth in area."""

Marks = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One task: what is asked, and marks in [0, 1] (or PSNR in dB) for the frames that come back."""

    request: Request
    judge: Callable[[Tensor], Marks]


def text_case(rng: random.Random, variant: Variant, task: str) -> Case:
    """t2v or t2i: the caption of a random scene."""
    moving = task == "t2v"
    scene = random_scene(rng)
    prompt = varied_caption(scene, rng, moving=moving)
    size = variant.resolutions[0] if moving else rng.choice(variant.resolutions)
    request = Request(prompt=prompt, task=task, height=size[0], width=size[1])
    return Case(request=request, judge=lambda frames: _shows(frames, scene, moving=moving))


def first_frame_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn first frame and the caption of its clip."""
    scene, frames = random_clip(rng, variant.num_frames, variant.resolutions[0])
    request = Request(prompt=varied_caption(scene, rng), task="i2v", image=frames[0])

    def judge(made: Tensor) -> Marks:
        return {**_shows(made, scene, moving=True), "first_frame_psnr": _psnr(made[0], frames[0])}

    return Case(request=request, judge=judge)


def keyframes_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn clip's first and last frame, and sometimes one between them."""
    scene, frames = random_clip(rng, variant.num_frames, variant.resolutions[0])
    given = [0, len(frames) - 1] + ([len(frames) // 2] if rng.random() < 0.3 else [])
    request = Request(prompt=varied_caption(scene, rng), task="i2v", keyframes={at: frames[at] for at in given})

    def judge(made: Tensor) -> Marks:
        return {
            **_shows(made, scene, moving=True),
            "first_frame_psnr": _psnr(made[0], frames[0]),
            "last_frame_psnr": _psnr(made[-1], frames[-1]),
        }

    return Case(request=request, judge=judge)


def extend_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: the first five frames of a drawn clip go on."""
    scene = random_scene(rng)
    size = variant.resolutions[0]
    trajectory = random_trajectory(scene, rng, size)
    clip = draw(scene, trajectory, variant.num_frames, size)[:5]
    request = Request(prompt=varied_caption(scene, rng), task="i2v", extend=clip)
    fastest = TRAVEL[1] / 64 / (variant.num_frames - 1) if scene.direction else 0.0

    def judge(made: Tensor) -> Marks:
        seen = recognise(made)
        path = torch.tensor(seen.path)
        jump = float((path[1:] - path[:-1]).norm(dim=1).max()) if len(path) else math.inf
        marks = {"color": seen.color == scene.color, "shape": seen.shape == scene.shape}
        # Twice the step of the fastest clip of the language and what the recogniser may be off, anywhere in the clip.
        marks["no_jump"] = jump < 2 * fastest + 0.02
        marks["motion"] = seen.motion == (scene.direction or "still")
        return {**_all(marks), "kept_psnr": _psnr(made[:3], clip[:3])}

    return Case(request=request, judge=judge)


def loop_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn picture of a shape at rest, as a loop."""
    scene = replace(random_scene(rng), direction=None)
    size = variant.resolutions[0]
    picture = draw(scene, random_trajectory(scene, rng, size), 1, size)[0]
    request = Request(prompt=varied_caption(scene, rng), task="i2v", image=picture, loop=True)

    def judge(made: Tensor) -> Marks:
        return {**_shows(made, scene, moving=True), "ends_meet_psnr": _psnr(made[-1], made[0])}

    return Case(request=request, judge=judge)


def edit_case(rng: random.Random, variant: Variant) -> Case:
    """i2i: a drawn picture and one instruction."""
    scene, edit, before, _ = random_pair(rng, rng.choice(variant.resolutions))
    height, width = before.shape[:2]
    request = Request(prompt=varied_instruction(edit, rng), task="i2i", image=before, height=height, width=width)

    def judge(frames: Tensor) -> Marks:
        return judge_edit(recognise(before[None]), recognise(frames), scene, edit)

    return Case(request=request, judge=judge)


def judge_edit(before: Sighting, after: Sighting, scene: Scene, edit: Edit) -> Marks:
    """Whether the edit was `done`, and whether the `rest` was left alone."""
    wanted = apply(scene, edit)
    if edit.kind == "remove":
        done, rest = after.is_empty, after.background == scene.background
    else:
        done = getattr(after, edit.kind) == edit.value
        others = [name for name in ("color", "shape", "background") if name != edit.kind]
        rest = all(getattr(after, name) == getattr(wanted, name) for name in others) and _same_place(before, after)
    return {"done": float(done), "rest": float(rest), "all": float(done and rest), f"done_{edit.kind}": float(done)}


def _same_place(before: Sighting, after: Sighting) -> bool:
    if not before.path or not after.path or not before.extent or after.extent is None:
        return False
    near = math.dist(before.path[0], after.path[0]) <= SAME_PLACE
    return near and abs(after.extent / before.extent - 1) <= SAME_EXTENT


def inpaint_case(rng: random.Random, variant: Variant) -> Case:
    """t2i with a mask over a whole drawn shape: another one of another colour is asked for in its place."""
    size = rng.choice(variant.resolutions)
    scene = replace(random_scene(rng), direction=None)
    trajectory = random_trajectory(scene, rng, size)
    picture = draw(scene, trajectory, 1, size)[0]
    mask = _mask_over(trajectory.start, trajectory.radius, size, rng)
    wanted = replace(random_scene(rng), background=scene.background, size=scene.size, direction=None)
    request = Request(
        prompt=varied_caption(wanted, rng, moving=False), task="t2i", image=picture, mask=mask, height=size[0],
        width=size[1],
    )  # fmt: skip

    def judge(frames: Tensor) -> Marks:
        outside = mask == 0
        same = torch.equal(frames[0][outside], picture[outside])
        return {"outside_identical": float(same), **_shows(frames, wanted, moving=False)}

    return Case(request=request, judge=judge)


def _mask_over(centre: tuple[float, float], radius: float, size: tuple[int, int], rng: random.Random) -> Tensor:
    """(H, W): a round or square spot that covers the shape with some room."""
    reach = radius * rng.uniform(1.4, 1.8) + 3
    x = torch.arange(size[1]) + 0.5 - centre[0]
    y = torch.arange(size[0])[:, None] + 0.5 - centre[1]
    inside = x * x + y * y < reach * reach if rng.random() < 0.5 else (x.abs() < reach) & (y.abs() < reach)
    return inside.float()


def _shows(frames: Tensor, scene: Scene, *, moving: bool) -> Marks:
    seen = recognise(frames)
    marks = {name: getattr(seen, name) == getattr(scene, name) for name in ("color", "background", "shape")}
    if moving:
        marks["motion"] = seen.motion == (scene.direction or "still")
    return _all(marks)


def _all(marks: dict[str, bool]) -> Marks:
    return {**{name: float(value) for name, value in marks.items()}, "all": float(all(marks.values()))}


def _psnr(made: Tensor, wanted: Tensor) -> float:
    return float(-10 * torch.log10((made - wanted).square().mean().clamp_min(1e-10)))


CASES: dict[str, tuple[str, Callable[[random.Random, Variant], Case]]] = {
    "t2v": ("nano-video", lambda rng, variant: text_case(rng, variant, "t2v")),
    "i2v": ("nano-video", first_frame_case),
    "keyframes": ("nano-video", keyframes_case),
    "extend": ("nano-video", extend_case),
    "loop": ("nano-video", loop_case),
    "t2i": ("nano-image", lambda rng, variant: text_case(rng, variant, "t2i")),
    "i2i": ("nano-edit", edit_case),
    "inpaint": ("nano-image", inpaint_case),
}
"""What can be scored: the model that answers unless another is named, and how a case is drawn."""
