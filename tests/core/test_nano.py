"""The Nano language, its drawings and the recogniser."""

import random

import pytest
import torch

from kandinsky5_core.nano.drawing import Trajectory, draw, random_clip, random_scene, random_trajectory
from kandinsky5_core.nano.language import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene, caption, parse, varied_caption
from kandinsky5_core.nano.recognise import recognise


def test_the_recogniser_names_what_was_drawn_even_with_noise_and_blur() -> None:
    rng, wrong = random.Random(11), []
    for number in range(60):
        scene, frames = random_clip(rng, 17, (64, 64))
        if number % 2:
            blurred = torch.nn.functional.avg_pool2d(frames.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
            frames = (blurred.permute(0, 2, 3, 1) + 0.03 * torch.randn(frames.shape)).clamp(0, 1)
        seen = recognise(frames)
        if (seen.color, seen.shape, seen.motion, seen.background) != (
            scene.color, scene.shape, scene.direction or "still", scene.background,
        ):  # fmt: skip
            wrong.append((scene, seen))
    assert len(wrong) <= 1, wrong


def test_the_recogniser_does_not_see_what_is_not_there() -> None:
    seen = recognise(torch.full((17, 64, 64, 3), 8 / 255))
    assert (seen.color, seen.shape, seen.motion, seen.background) == (None, None, None, "black")
    rng = random.Random(1)
    scene = Scene(color="red", shape="circle", background="gray", size="big", direction="left")
    clip = draw(scene, random_trajectory(scene, rng, (64, 64)), 17, (64, 64))
    assert recognise(clip.flip(0)).motion == "right"
    assert recognise(clip.flip(2)).motion == "right"
    assert recognise(clip[torch.randperm(17, generator=torch.Generator().manual_seed(0))]).motion != "left"
    assert recognise(clip[..., [1, 0, 2]]).color == "green"


def test_pictures_of_any_size_are_recognised_even_with_noise_and_blur() -> None:
    rng, wrong = random.Random(12), []
    noise = torch.Generator().manual_seed(1)
    for size in ((64, 64), (64, 96), (96, 64), (96, 96), (128, 200)):
        for number in range(30):
            scene, picture = random_clip(rng, 1, size)
            if number % 2:
                blurred = torch.nn.functional.avg_pool2d(picture.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
                picture = (blurred.permute(0, 2, 3, 1) + 0.03 * torch.randn(picture.shape, generator=noise)).clamp(0, 1)
                picture = (picture * 255).round() / 255
            seen = recognise(picture)
            if (seen.color, seen.shape, seen.background) != (scene.color, scene.shape, scene.background):
                wrong.append((size, scene, seen))
    assert len(wrong) <= 1, wrong


def test_place_and_radius_are_in_shorter_sides() -> None:
    for shape in SHAPES:
        scene = Scene(color="yellow", shape=shape, background="brown")
        for size, centre in (((64, 96), (70.0, 20.0)), ((96, 64), (20.0, 70.0)), ((128, 128), (50.0, 80.0))):
            seen = recognise(draw(scene, Trajectory(start=centre, end=centre, radius=11.0), 1, size))
            assert seen.path[0] == pytest.approx([value / min(size) for value in centre], abs=0.01)
            assert seen.radius == pytest.approx(11 / min(size), rel=0.03)


def test_an_empty_picture_has_a_background_and_nothing_else() -> None:
    noise = 0.03 * torch.randn(1, 96, 64, 3, generator=torch.Generator().manual_seed(2))
    for name, color in BACKGROUNDS.items():
        seen = recognise((torch.tensor(color).expand(1, 96, 64, 3) / 255 + noise).clamp(0, 1))
        assert (seen.color, seen.shape, seen.background, seen.is_empty, seen.path) == (None, None, name, True, ())


def test_what_has_the_outline_of_no_shape_is_none() -> None:
    scene = Scene(color="red", shape="square", background="gray")
    left, right = (
        draw(scene, Trajectory(start=(x, 30.0), end=(x, 30.0), radius=7.0), 1, (64, 64)) for x in (16.0, 48.0)
    )
    two = torch.cat([left[:, :, :32], right[:, :, 32:]], dim=2)
    bar = left.clone()
    bar[:, 28:34, 10:50] = left[0, 30, 16]
    for frames in (two, bar):
        seen = recognise(frames)
        assert (seen.color, seen.shape, seen.is_empty) == ("red", None, False)


def test_the_path_is_the_centre_in_sides() -> None:
    scene = Scene(color="white", shape="square", background="black", size="small", direction="right")
    trajectory = random_trajectory(scene, random.Random(3), (64, 64))
    path = recognise(draw(scene, trajectory, 9, (64, 64))).path
    for found, expected in ((path[0], trajectory.start), (path[-1], trajectory.end)):
        assert found == pytest.approx([value / 64 for value in expected], abs=0.01)


def test_sentences_say_what_the_scene_is() -> None:
    rng = random.Random(2)
    for _ in range(300):
        scene = random_scene(rng)
        found = parse(varied_caption(scene, rng))
        assert (found.color, found.shape, found.direction, found.background) == (
            scene.color, scene.shape, scene.direction, scene.background,
        )  # fmt: skip
        assert found.size in (scene.size, None)
    scene = Scene(size="small", color="red", shape="circle", direction="left", background="navy")
    assert caption(scene) == "a small red circle moves left on a navy background"
    assert (
        caption(Scene(color="red", shape="circle", background="navy"))
        == "a red circle stays still on a navy background"
    )


def test_all_combinations_occur() -> None:
    rng = random.Random(4)
    seen = {(s.color, s.shape, s.direction, s.background) for s in (random_scene(rng) for _ in range(12_000))}
    assert len(seen) == len(COLORS) * len(SHAPES) * (len(DIRECTIONS) + 1) * len(BACKGROUNDS) == 360


def test_a_prompt_outside_the_language_is_answered_with_its_words() -> None:
    with pytest.raises(ValueError, match="names no color; use one of red, green"):
        parse("an orange circle on a black background")
