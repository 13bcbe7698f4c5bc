"""Random tasks for the embedded models, each with its judge: what `score-nano` asks and how it marks the answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import Variant
from ..request import Request
from .drawing import Trajectory, draw, random_clip, random_pair, random_scene, random_trajectory
from .edits import varied_instruction
from .judge import Marks, judge_edit, judge_extension, judge_outside, judge_scene, psnr
from .language import Scene, varied_caption

COVERING_SHARE = 0.6
"""Of the inpainting masks that lie over the whole shape; the others lie anywhere."""
NEW_SHARE = 0.75
"""Of those with a covering mask that ask for something else than was there."""


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
    return Case(request=request, judge=lambda frames: judge_scene(frames, scene, moving=moving))


def first_frame_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn first frame and the caption of its clip."""
    scene, frames = random_clip(rng, variant.num_frames, variant.resolutions[0])
    request = Request(prompt=varied_caption(scene, rng), task="i2v", image=frames[0])

    def judge(made: Tensor) -> Marks:
        return {**judge_scene(made, scene, moving=True), "first_frame_psnr": psnr(made[0], frames[0])}

    return Case(request=request, judge=judge)


def keyframes_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn clip's first and last frame, and sometimes one between them."""
    scene, frames = random_clip(rng, variant.num_frames, variant.resolutions[0])
    given = [0, len(frames) - 1] + ([len(frames) // 2] if rng.random() < 0.3 else [])
    request = Request(prompt=varied_caption(scene, rng), task="i2v", keyframes={at: frames[at] for at in given})

    def judge(made: Tensor) -> Marks:
        return {
            **judge_scene(made, scene, moving=True),
            "first_frame_psnr": psnr(made[0], frames[0]),
            "last_frame_psnr": psnr(made[-1], frames[-1]),
        }

    return Case(request=request, judge=judge)


def extend_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a whole drawn clip goes on, with room for its shape to move on as before."""
    scene, size, overlap = random_scene(rng), variant.resolutions[0], 5
    new_share = (variant.num_frames - overlap) / (variant.num_frames - 1)
    trajectory = random_trajectory(scene, rng, size)
    while not _stays_inside(trajectory, 1 + new_share, size):
        trajectory = random_trajectory(scene, rng, size)
    clip = draw(scene, trajectory, variant.num_frames, size)
    request = Request(prompt=varied_caption(scene, rng), task="i2v", extend=clip, overlap=overlap)
    return Case(request=request, judge=lambda made: judge_extension(made, clip, overlap, scene))


def _stays_inside(trajectory: Trajectory, progress: float, size: tuple[int, int]) -> bool:
    """Whether the shape is in the frame when it has moved on to `progress` times its way."""
    ends = zip(trajectory.start, trajectory.end, (size[1], size[0]), strict=True)
    margin = trajectory.radius + 1
    return all(margin <= start + progress * (end - start) <= side - margin for start, end, side in ends)


def loop_case(rng: random.Random, variant: Variant) -> Case:
    """i2v: a drawn picture of a shape at rest, as a loop."""
    scene = replace(random_scene(rng), direction=None)
    size = variant.resolutions[0]
    picture = draw(scene, random_trajectory(scene, rng, size), 1, size)[0]
    request = Request(prompt=varied_caption(scene, rng), task="i2v", image=picture, loop=True)

    def judge(made: Tensor) -> Marks:
        return {**judge_scene(made, scene, moving=True), "ends_meet_psnr": psnr(made[-1], made[0])}

    return Case(request=request, judge=judge)


def edit_case(rng: random.Random, variant: Variant) -> Case:
    """i2i: a drawn picture and one instruction."""
    scene, edit, before, _ = random_pair(rng, rng.choice(variant.resolutions))
    height, width = before.shape[:2]
    request = Request(prompt=varied_instruction(edit, rng), task="i2i", image=before, height=height, width=width)

    return Case(request=request, judge=lambda frames: judge_edit(before, frames[0], scene, edit))


def inpaint_case(rng: random.Random, variant: Variant) -> Case:
    """t2i with a mask: over the whole drawn shape, to put another or the same in its place, or anywhere."""
    size = rng.choice(variant.resolutions)
    scene = replace(random_scene(rng), direction=None)
    trajectory = random_trajectory(scene, rng, size)
    picture = draw(scene, trajectory, 1, size)[0]
    covering = rng.random() < COVERING_SHARE
    mask = _mask_over(trajectory, size, rng) if covering else _mask_anywhere(size, rng)
    wanted = _another(scene, rng) if covering and rng.random() < NEW_SHARE else scene
    request = Request(
        prompt=varied_caption(wanted, rng, moving=False), task="t2i", image=picture, mask=mask, height=size[0],
        width=size[1],
    )  # fmt: skip

    def judge(frames: Tensor) -> Marks:
        shown = judge_scene(frames, wanted, moving=False)
        outside = {"outside_identical": judge_outside(frames[0], picture, mask)}
        return {**outside, **(shown if covering else {"all_of_partly_covered": shown["all"]})}

    return Case(request=request, judge=judge)


def _another(scene: Scene, rng: random.Random) -> Scene:
    """Another colour, another shape or both, on the same background."""
    wanted = scene
    while (wanted.color, wanted.shape) == (scene.color, scene.shape):
        other = random_scene(rng)
        wanted = replace(scene, color=other.color, shape=other.shape)
    return wanted


def _mask_over(trajectory: Trajectory, size: tuple[int, int], rng: random.Random) -> Tensor:
    """(H, W): a round or rectangular spot that covers the shape with some room."""
    # The farthest point of any shape is 1.26 radii from its centre.
    reach = [trajectory.radius * rng.uniform(1.4, 1.8) + 3 for _ in range(2)]
    return _spot(trajectory.start, reach, size, rng)


def _mask_anywhere(size: tuple[int, int], rng: random.Random) -> Tensor:
    """(H, W): a round or rectangular spot, smaller than the frame."""
    centre = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    return _spot(centre, [rng.uniform(0.08, 0.3) * min(size) for _ in range(2)], size, rng)


def _spot(centre: tuple[float, float], reach: list[float], size: tuple[int, int], rng: random.Random) -> Tensor:
    """A disk of the first reach, or a rectangle of both."""
    x = (torch.arange(size[1]) + 0.5 - centre[0])[None]
    y = (torch.arange(size[0]) + 0.5 - centre[1])[:, None]
    if rng.random() < 0.5:
        return (x * x + y * y < reach[0] ** 2).float()
    return ((x.abs() < reach[0]) & (y.abs() < reach[1])).float()


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
REQUEST_TASKS = {"keyframes": "i2v", "extend": "i2v", "loop": "i2v", "inpaint": "t2i"}
"""The task of the requests, where it is not called the same."""
