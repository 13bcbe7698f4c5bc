"""Pictures and clips that a request gives: what the DiT is shown, what stays, and what is refused."""

from dataclasses import replace

import pytest
import torch

from kandinsky5_core import Models, Request, generate, load
from kandinsky5_core.clips import join
from kandinsky5_core.config import variant
from kandinsky5_core.inputs import encode_frames, encode_inputs
from kandinsky5_core.request import keyframe_positions, resolve
from kandinsky5_core.shapes import VideoShape

PROMPT = "a big red circle on a gray background"
CLIP_PROMPT = "a big red circle stays still on a gray background"
BUDGET = Request(prompt="x").vae_budget_bytes


@pytest.fixture(scope="module")
def image_model() -> Models:
    return load("nano-image")


@pytest.fixture(scope="module")
def edit_model() -> Models:
    return load("nano-edit")


@pytest.fixture(scope="module")
def video_model() -> Models:
    return load("nano-video")


def photo(height, width, seed=0):
    """Nothing that any model here was trained on."""
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def inputs_of(models, request):
    request = resolve(request, models.variant)
    shape = VideoShape(request.batch, request.num_frames, request.height, request.width)
    return encode_inputs(models, request, shape.latent_shape(models.variant.vae)), request


@pytest.mark.parametrize("size", [(64, 64), (50, 81), (200, 301), (7, 9)])
def test_inpainting_keeps_every_pixel_outside_the_mask_at_the_pictures_own_size(image_model, size):
    picture = photo(*size)
    mask = torch.zeros(size)
    mask[: size[0] // 2, : size[1] // 3] = 1
    request = Request(prompt=PROMPT, task="t2i", image=picture, mask=mask, num_steps=2, batch=2)
    frames = generate(image_model, request).frames
    assert frames.shape == (2, 1, *size, 3)
    assert torch.equal(frames[0, 0][mask == 0], picture[mask == 0])
    assert not torch.equal(frames[0, 0][mask == 1], picture[mask == 1])
    assert not torch.equal(frames[0, 0], frames[1, 0])


def test_feather_blends_beyond_the_mask_and_not_further(image_model):
    picture, mask = photo(64, 64), torch.zeros(64, 64)
    mask[20:40, 20:40] = 1
    request = Request(prompt=PROMPT, task="t2i", image=picture, mask=mask, mask_grow=2, mask_feather=4, num_steps=1)
    made = generate(image_model, request).frames[0, 0]
    changed = (made != picture).any(-1)
    assert bool(changed[17:43, 17:43].float().mean() > 0.9)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[20 - 6 : 40 + 6, 20 - 6 : 40 + 6] = False
    assert not bool(changed[outside].any())


def test_outpainting_keeps_the_picture_but_for_a_strip(image_model):
    picture = photo(48, 64)
    made = generate(image_model, Request(prompt=PROMPT, task="t2i", image=picture, outpaint=(0, 8, 24, 5), num_steps=2))
    assert made.frames.shape == (1, 1, 48 + 13, 64 + 24, 3)
    assert torch.equal(made.frames[0, 0, 8 + 8 : 8 + 48 - 8, : 64 - 8], picture[8:-8, :-8])
    assert made.settings["outpaint"] == [0, 8, 24, 5]


def test_editing_with_a_mask_shows_the_source_and_keeps_the_rest(edit_model):
    picture, mask = photo(64, 96), torch.zeros(64, 96)
    mask[:, 48:] = 1
    request = Request(prompt="make the circle red", task="i2i", image=picture, mask=mask, num_steps=1)
    inputs, resolved = inputs_of(edit_model, request)
    assert inputs.image.source is not None and bool((inputs.image.mask == 1).all())
    torch.testing.assert_close(inputs.image.source, encode_frames(edit_model, picture[None], BUDGET), atol=1e-6, rtol=0)
    assert resolved.fit == "keep"
    made = generate(edit_model, request).frames[0, 0]
    assert torch.equal(made[:, :48], picture[:, :48])


def test_the_nearer_denoise_is_to_zero_the_nearer_the_result_to_the_picture(image_model):
    picture = torch.full((64, 64, 3), 118 / 255)
    picture[20:40, 20:40] = torch.tensor([225, 40, 40]) / 255
    distances = []
    for denoise in (0.05, 0.5, 0.95):
        request = Request(prompt="a big white circle on a navy background", task="t2i", image=picture, denoise=denoise)
        made = generate(image_model, replace(request, guidance_scale=1.0)).frames[0, 0]
        distances.append(float((made - picture).abs().mean()))
    assert distances[0] < 0.05 and distances == sorted(distances)


def test_grey_masks_change_less(image_model):
    picture, grey = torch.full((64, 64, 3), 118 / 255), torch.full((64, 64), 0.1)
    request = Request(prompt="a big white circle on a navy background", task="t2i", image=picture, mask=grey, seed=3)
    request = replace(request, guidance_scale=1.0)
    little = generate(image_model, request).frames[0, 0]
    much = generate(image_model, replace(request, mask=torch.ones(64, 64))).frames[0, 0]
    assert (little - picture).abs().mean() < 0.5 * (much - picture).abs().mean()


def test_video_to_video_with_a_mask_for_each_frame(video_model):
    clip, mask = torch.rand(10, 64, 64, 3), torch.zeros(9, 64, 64)
    mask[5:, :32] = 1
    request = Request(prompt=CLIP_PROMPT, video=clip, mask=mask, num_steps=1)
    made = generate(video_model, request).frames
    assert made.shape == (1, 9, 64, 64, 3)
    assert torch.equal(made[0, :5], clip[:5]) and torch.equal(made[0, :, 32:], clip[:9, 32:])
    inputs, _ = inputs_of(video_model, request)
    assert inputs.partial.strength.shape == (1, 1, 3, 8, 8)
    assert inputs.partial.strength[0, 0, :, 0, 0].tolist() == [0, 0, 1]


def test_keyframes_are_clean_latents_at_their_places(video_model):
    first, last = photo(64, 64, 1), photo(64, 64, 2)
    request = Request(prompt=CLIP_PROMPT, task="i2v", keyframes={-1: last, 0: first}, num_steps=1)
    inputs, _ = inputs_of(video_model, request)
    assert inputs.image.mask[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0, 1]
    torch.testing.assert_close(inputs.image.clean[:, :, :1], encode_frames(video_model, first[None], BUDGET))
    still = encode_frames(video_model, last[None].expand(5, -1, -1, -1), BUDGET)
    torch.testing.assert_close(inputs.image.clean[:, :, 4], still[:, :, 1])
    assert float(inputs.image.clean[:, :, 1:4].abs().max()) == 0
    seen = []
    hook = video_model.dit.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generate(video_model, request)
    hook.remove()
    assert torch.equal(seen[0][:, :16, [0, 4]], inputs.image.clean[:, :, [0, 4]])
    assert float(seen[0][:, 16:32].abs().max()) == 0
    assert seen[0][0, 32, :, 0, 0].tolist() == [1, 0, 0, 0, 1]


def test_a_clip_goes_on_from_its_last_frames(video_model):
    clip = torch.rand(6, 64, 64, 3)
    request = Request(prompt=CLIP_PROMPT, task="i2v", extend=clip, num_frames=9, chunks=2, num_steps=1, batch=2)
    made = generate(video_model, request).frames
    assert made.shape == (2, 6 + 4 + 4, 64, 64, 3)
    assert torch.equal(made[0, 0], clip[0])
    inputs, _ = inputs_of(video_model, request)
    assert inputs.image.mask[0, 0, :, 0, 0].tolist() == [1, 1, 0]
    last = encode_frames(video_model, clip[-5:], BUDGET)
    torch.testing.assert_close(inputs.image.clean[:, :, :2], last.expand(2, -1, -1, -1, -1))


def test_joining_fades_from_the_old_clip_into_the_new():
    clip, piece = torch.zeros(6, 2, 2, 3), torch.ones(5, 2, 2, 3)
    joined = join(clip, piece, 3)
    assert joined[:, 0, 0, 0].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_a_loop_is_held_at_both_ends_and_drops_the_repetition(video_model):
    made = generate(video_model, Request(prompt=CLIP_PROMPT, loop=True, num_steps=1, seed=4)).frames
    assert made.shape == (1, 13, 64, 64, 3)
    picture = photo(64, 64)
    looped = generate(video_model, Request(prompt=CLIP_PROMPT, task="i2v", image=picture, loop=True, num_steps=1))
    assert looped.frames.shape == (1, 13, 64, 64, 3)


def test_keyframe_positions():
    pictures = {0: "a", -1: "b", 8: "c"}
    assert keyframe_positions(pictures, 17) == {0: "a", 8: "c", 16: "b"}
    with pytest.raises(ValueError, match="keyframe 17 is outside the clip of 17 frames"):
        keyframe_positions({17: "a"}, 17)
    with pytest.raises(ValueError, match="keyframes 5 and 8 fall into one latent frame"):
        keyframe_positions({5: "a", 8: "b"}, 17)


PICTURE = torch.zeros(64, 64, 3)
CLIP = torch.zeros(9, 64, 64, 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nano-image", {"denoise": 0.5}, "need something to start from"),
        ("nano-image", {"image": PICTURE, "denoise": 0.0}, "denoise must be above 0"),
        ("nano-image", {"image": PICTURE, "mask": torch.ones(32, 64)}, "mask is 64x32 and the picture 64x64"),
        ("nano-image", {"image": PICTURE, "mask": torch.zeros(64, 64)}, "mask is empty"),
        ("nano-image", {"image": PICTURE, "outpaint": (0, 0, -1, 0)}, "four pixel counts"),
        ("nano-image", {"image": PICTURE, "outpaint": (0, 0, 900, 0)}, "longer than 4:1"),
        ("nano-image", {"image": torch.zeros(10, 500, 3), "denoise": 0.5}, "500x10 is longer than 4:1"),
        ("nano-image", {"image": torch.zeros(64, 64, 4), "denoise": 0.5}, r"image has shape \(64, 64, 4\)"),
        ("nano-image", {"width": 4096, "height": 64}, "width 4096 is beyond"),
        ("nano-image", {"image": PICTURE, "mask": torch.ones(64, 64), "mask_feather": -1}, "mask_feather -1"),
        ("nano-image", {"keyframes": {0: PICTURE}}, "use task i2v"),
        ("nano-image", {"loop": True}, "loop is a clip|cannot"),
        ("nano-edit", {"task": "i2i", "image": PICTURE, "edit_template": "x"}, "snapshot, one-line, diffusers"),
        ("nano-video", {"task": "i2v", "image": PICTURE, "keyframes": {0: PICTURE}}, "both the first frame"),
        ("nano-video", {"task": "i2v", "image": PICTURE, "denoise": 0.5}, "work with t2v on a clip"),
        ("nano-video", {"task": "t2v", "video": CLIP}, "--denoise below 1"),
        ("nano-video", {"task": "t2v", "video": CLIP, "denoise": 0.5, "num_frames": 13}, "more than the video gives"),
        ("nano-video", {"task": "i2v", "extend": CLIP, "overlap": 4}, "overlap 4 is not of the form"),
        ("nano-video", {"task": "i2v", "extend": CLIP[:3]}, "3 frames, fewer than overlap 5"),
        ("nano-video", {"task": "i2v", "extend": CLIP, "num_frames": 5}, "leaves nothing new"),
        ("nano-video", {"task": "i2v", "extend": CLIP, "chunks": 0}, "chunks 0"),
    ],
)  # fmt: skip
def test_bad_input_names_the_input_and_the_fix(name, change, message):
    task = variant(name).tasks[0]
    task = "t2i" if name == "nano-edit" else task
    with pytest.raises(ValueError, match=message):
        resolve(Request(**{"prompt": "x", "task": task, **change}), variant(name))


def test_one_pixel_pictures_work(image_model, edit_model, video_model):
    pixel = torch.rand(1, 1, 3)
    for models, request in (
        (image_model, Request(prompt="x", task="t2i", image=pixel, denoise=0.5, num_steps=1)),
        (edit_model, Request(prompt="x", task="i2i", image=pixel, num_steps=1)),
        (video_model, Request(prompt="x", task="i2v", image=pixel, num_frames=5, num_steps=1)),
    ):
        assert torch.isfinite(generate(models, request).frames).all()


def test_resolving_twice_changes_nothing(image_model):
    request = Request(prompt="x", task="t2i", image=photo(50, 70), mask=torch.ones(50, 70))
    once = resolve(request, image_model.variant)
    twice = resolve(once, image_model.variant)
    assert torch.equal(once.mask, twice.mask)
    assert replace(once, mask=None, image=None) == replace(twice, mask=None, image=None)
