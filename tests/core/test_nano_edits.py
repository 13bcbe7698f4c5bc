"""The edit language, and the judges of edits, inpainting and extension: right answers pass and wrong ones do not."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kandinsky5_core.config import NANO_IMAGE_SIZES, VARIANTS
from kandinsky5_core.nano.cases import CASES, REQUEST_TASKS
from kandinsky5_core.nano.drawing import Trajectory, draw, random_pair, random_scene
from kandinsky5_core.nano.edits import KINDS, Edit, apply, instruction, parse_edit, random_edit, varied_instruction
from kandinsky5_core.nano.judge import judge_edit, judge_extension, judge_outside
from kandinsky5_core.nano.language import COLORS, Scene, parse
from kandinsky5_core.nano.recognise import recognise
from kandinsky5_core.nano.score import score_nano

SIZE = (64, 96)
SCENE = Scene(color="red", shape="square", background="gray", size="big")


def as_decoded(picture: Tensor) -> Tensor:
    """The picture after about what a VAE and a file do to it: blur, noise, 8 bits."""
    noise = 0.02 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    channels = torch.nn.functional.pad(picture.permute(2, 0, 1)[None], (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.avg_pool2d(channels, 3, 1)[0].permute(1, 2, 0)
    return ((blurred + noise).clamp(0, 1) * 255).round() / 255


def drawn(scene: Scene, centre: tuple[float, float] = (40.0, 30.0), radius: float = 11.0) -> Tensor:
    return draw(scene, Trajectory(start=centre, end=centre, radius=radius), 1, SIZE)[0]


def test_sentences_say_what_the_edit_is() -> None:
    rng = random.Random(2)
    for _ in range(200):
        edit = random_edit(random_scene(rng), rng)
        for text in (instruction(edit), varied_instruction(edit, rng)):
            found = parse_edit(text)
            assert (found.kind, found.value) == (edit.kind, edit.value), text
            assert edit.kind == "background" or found.shape == edit.shape
    assert instruction(Edit(kind="color", shape="circle", value="red")) == "make the circle red"
    with pytest.raises(ValueError, match="no edit of the Nano language; say 'make the circle red'"):
        parse_edit("make it nicer")


def test_an_edit_changes_one_thing() -> None:
    rng, kinds = random.Random(3), set()
    for _ in range(200):
        scene = random_scene(rng)
        edit = random_edit(scene, rng)
        kinds.add(edit.kind)
        after = apply(scene, edit)
        names = ("color", "shape", "background", "size")
        changed = [name for name in names if getattr(after, name) != getattr(scene, name)]
        assert changed == ["shape" if edit.kind == "remove" else edit.kind]
    assert kinds == set(KINDS)


def test_drawn_edits_are_done_and_leave_the_rest() -> None:
    rng, wrong = random.Random(4), []
    for number in range(160):
        scene, edit, before, after = random_pair(rng, NANO_IMAGE_SIZES[number % 4])
        marks = judge_edit(before, as_decoded(after), scene, edit)
        if not marks["all"]:
            wrong.append((scene, edit, marks))
    assert len(wrong) <= 1, wrong


def test_an_edit_that_was_not_done_is_not_done() -> None:
    rng = random.Random(5)
    for number in range(80):
        scene, edit, before, _ = random_pair(rng, NANO_IMAGE_SIZES[number % 4])
        marks = judge_edit(before, as_decoded(before), scene, edit)
        assert (marks["done"], marks["all"]) == (0, 0)
        # Nothing at all was changed, so nothing else was.
        assert marks["rest"] == 1, (scene, edit, marks)


RED_TO_BLUE = Edit(kind="color", shape="square", value="blue")
BLUE = replace(SCENE, color="blue")


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (drawn(BLUE, centre=(44.0, 30.0)), "place"),
        (drawn(BLUE, radius=7.5), "size"),
        (drawn(replace(BLUE, shape="circle")), "shape"),
        (drawn(replace(BLUE, background="navy")), "background"),
        ((drawn(BLUE) + 0.1).clamp(0, 1), "background"),
        (torch.cat([drawn(BLUE)[:, :70], drawn(BLUE, centre=(82.0, 30.0), radius=5.0)[:, 70:]], dim=1), "clean"),
        (drawn(replace(SCENE, shape=None)), "shape"),
    ],
    ids=["moved", "shrunk", "another-shape", "another-background", "a-lighter-background", "a-second-shape", "gone"],
)  # fmt: skip
def test_a_change_beside_the_edit_is_seen(after: Tensor, what: str) -> None:
    marks = judge_edit(drawn(SCENE), after, SCENE, RED_TO_BLUE)
    assert marks["rest"] == marks[f"same_{what}"] == marks["all"] == 0
    assert judge_edit(drawn(SCENE), drawn(BLUE), SCENE, RED_TO_BLUE)["rest"] == 1


def test_each_kind_is_judged_by_what_it_asks() -> None:
    before = drawn(SCENE)
    to_navy = Edit(kind="background", shape="square", value="navy")
    to_circle = Edit(kind="shape", shape="square", value="circle")
    remove = Edit(kind="remove", shape="square")
    navy = drawn(replace(SCENE, background="navy"))
    assert judge_edit(before, navy, SCENE, to_navy)["all"] == 1
    assert judge_edit(before, drawn(replace(BLUE, background="navy")), SCENE, to_navy)["same_color"] == 0
    # A dull red is still called red, but it is not the red that was there.
    dull = Scene(color="red", shape="circle", background="gray", size="big")
    assert judge_edit(before, (drawn(dull) - torch.tensor([0.2, 0, 0])).clamp(0, 1), SCENE, to_circle)["rest"] == 0
    assert judge_edit(before, drawn(replace(SCENE, shape=None)), SCENE, remove)["all"] == 1
    assert judge_edit(before, drawn(replace(SCENE, shape=None, background="navy")), SCENE, remove)["rest"] == 0


@pytest.mark.parametrize("left", [0.3, 1.0], ids=["a-trace", "all-of-it"])
def test_what_is_left_of_a_shape_is_not_removed(left: float) -> None:
    empty, before = drawn(replace(SCENE, shape=None)), drawn(SCENE)
    marks = judge_edit(before, empty + left * (before - empty), SCENE, Edit(kind="remove", shape="square"))
    assert (marks["done"], marks["rest"]) == (0, 1)


def test_a_picture_that_is_mostly_filled_is_not_empty() -> None:
    filled = torch.zeros(1, 64, 64, 3)
    filled[:, 6:60, 4:62] = 0.9
    assert not recognise(filled).is_empty
    assert recognise(torch.zeros(1, 64, 64, 3)).is_empty


def test_one_pixel_outside_the_mask_is_noticed() -> None:
    given, mask = drawn(SCENE), torch.zeros(SIZE)
    mask[10:50, 20:60] = 1
    made = torch.where(mask[..., None] > 0, torch.rand(*SIZE, 3), given)
    assert judge_outside(made, given, mask) == 1
    made[5, 5, 0] += 1e-6
    assert judge_outside(made, given, mask) == 0


def moving(start: float, end: float, num_frames: int, color: str = "red") -> Tensor:
    scene = Scene(color=color, shape="circle", background="navy", size="small", direction="right")
    return draw(scene, Trajectory(start=(start, 30.0), end=(end, 30.0), radius=7.0), num_frames, (64, 64))


def test_extension_is_judged_by_its_beginning_its_joint_and_what_follows() -> None:
    scene = Scene(color="red", shape="circle", background="navy", size="small", direction="right")
    whole = moving(10, 45, 29)
    clip = whole[:17]
    right = judge_extension(whole, clip, 5, scene)
    assert (right["all"], right["begins_identical"]) == (1, 1)
    assert right["overlap_psnr"] > 60
    jumped = torch.cat([clip, moving(38, 53, 12)])
    assert judge_extension(jumped, clip, 5, scene)["no_jump"] == 0
    turned = torch.cat([clip, moving(30, 15, 12)])
    assert judge_extension(turned, clip, 5, scene)["motion"] == 0
    assert judge_extension(torch.cat([clip, moving(30, 45, 12, "green")]), clip, 5, scene)["color"] == 0
    assert judge_extension(whole + 1e-4, clip, 5, scene)["begins_identical"] == 0


def test_a_flash_at_the_joint_of_a_still_clip_is_a_jump() -> None:
    scene = Scene(color="red", shape="circle", background="navy", size="small")
    whole = moving(30, 30, 29)
    assert judge_extension(whole, whole[:17], 5, scene)["no_jump"] == 1
    whole = whole.clone()
    whole[17] += 0.05
    assert judge_extension(whole, moving(30, 30, 17), 5, scene)["no_jump"] == 0


@pytest.mark.parametrize("task", list(CASES))
def test_every_task_makes_requests_of_its_model(task: str) -> None:
    model, make_case = CASES[task]
    variant, rng = VARIANTS[model], random.Random(6)
    for _ in range(10):
        case = make_case(rng, variant)
        assert case.request.task == REQUEST_TASKS.get(task, task)
        assert case.request.task in variant.tasks


def test_extended_clips_have_room_to_go_on() -> None:
    rng = random.Random(7)
    for _ in range(40):
        clip = CASES["extend"][1](rng, VARIANTS["nano-video"]).request.extend
        path = torch.tensor(recognise(clip).path)
        later = path[-1] + 0.75 * (path[-1] - path[0])
        assert 0.08 < float(later.min()) and float(later.max()) < 0.92


def test_inpainting_asks_for_something_else_or_leaves_the_shape_alone() -> None:
    rng, new, covering = random.Random(8), 0, 0
    for _ in range(60):
        request = CASES["inpaint"][1](rng, VARIANTS["nano-image"]).request
        seen, wanted = recognise(request.image[None]), parse(request.prompt)
        background = torch.tensor(seen.background_rgb)
        shape = (request.image - background).norm(dim=-1) > 0.02
        covered = bool((request.mask[shape] == 1).all())
        assert 0 < float(request.mask.mean()) < 1
        assert wanted.background == seen.background
        differs = (wanted.color, wanted.shape) != (seen.color, seen.shape)
        assert covered or not differs
        covering, new = covering + covered, new + differs
    assert 10 < new < covering < 60


def test_the_score_names_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="unknown task 'x2v'; use one of t2v, i2v"):
        score_nano(task="x2v")
    with pytest.raises(ValueError, match="nano-image does not do task 'extend'; use nano-video"):
        score_nano(task="extend", models="nano-image")
    with pytest.raises(ValueError, match="--n must be at least 1, got 0"):
        score_nano(count=0)


def test_no_color_of_the_language_is_near_another() -> None:
    # What SAME_COLOR counts on.
    named = torch.tensor(list(COLORS.values())) / 255
    distances = (named[:, None] - named).norm(dim=-1) + 9 * torch.eye(len(named))
    assert float(distances.min()) > 0.3
