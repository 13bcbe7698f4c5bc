"""The whole way on the embedded models: from Python and from the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kandinsky5_core import Models, Request, generate, load
from kandinsky5_core.canvas import cover
from kandinsky5_core.cli import main
from kandinsky5_core.config import VARIANTS, variant
from kandinsky5_core.media import read_metadata, read_video, write_image
from kandinsky5_core.nano.drawing import Trajectory, draw
from kandinsky5_core.nano.language import parse
from kandinsky5_core.nano.recognise import recognise
from kandinsky5_core.nano.score import generate_rows, score_nano
from kandinsky5_core.request import resolve

PROMPT = "a big red circle moves left on a black background"


@pytest.fixture(scope="module")
def nano() -> Models:
    return load("nano-video")


def test_prompt_to_clip(nano: Models) -> None:
    steps = []
    result = generate(nano, Request(prompt=PROMPT, seed=3), lambda step, total, latents: steps.append((step, total)))
    assert result.frames.shape == (1, 17, 64, 64, 3)
    assert 0 <= float(result.frames.min()) and float(result.frames.max()) <= 1
    seen = recognise(result.frames[0])
    assert (seen.color, seen.background) == ("red", "black")
    assert steps[-1] == (nano.variant.sampling.num_steps,) * 2
    assert set(result.seconds) == {"text", "dit", "vae_decode"}
    assert result.settings["guidance_scale"] == nano.variant.sampling.guidance_scale


def test_same_seed_same_clip_and_batches_hold_single_runs(nano: Models) -> None:
    request = Request(prompt=PROMPT, seed=8, num_steps=3)
    one, again = generate(nano, request).frames, generate(nano, request).frames
    assert torch.equal(one, again)
    batch = generate(nano, replace(request, seed=7, batch=2)).frames
    # Rotated q and k are rounded to bf16, so a batch's other summation order can flip a last bit here and there.
    assert (batch[1:] - one).abs().mean() < 1e-3
    assert (batch[1:] - one).abs().max() < 0.03
    assert not torch.allclose(batch[0], batch[1], atol=0.05)


def test_image_to_video_keeps_the_first_frame_and_moves_it(nano: Models) -> None:
    prompt = "a big yellow square moves down on a navy background"
    first = draw(parse(prompt), Trajectory(start=(30.0, 18.0), end=(30.0, 40.0), radius=11.0), 17, (64, 64))[0]
    frames = generate(nano, Request(prompt=prompt, task="i2v", image=first, seed=2)).frames[0]
    assert -10 * torch.log10((frames[0] - first).square().mean()) > 24
    assert recognise(frames).motion == "down"


def test_nabla_and_dense_and_samplers_run_on_the_same_models(nano: Models) -> None:
    request = Request(prompt=PROMPT, seed=3, num_steps=6)
    dense = generate(nano, request).frames
    nabla = generate(nano, replace(request, attention="nabla"))
    assert nabla.settings["attention"].startswith("nabla mass=0.9")
    assert (nabla.frames - dense).abs().mean() < 0.2
    for sampler in ("heun", "ab2"):
        assert torch.isfinite(generate(nano, replace(request, sampler=sampler)).frames).all()


def test_editing_shows_the_picture_to_the_dit_and_to_qwen_in_both_passes(nano: Models) -> None:
    editor = replace(nano, variant=replace(nano.variant, tasks=("i2i",)))
    seen = []
    hook = nano.dit.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[2])))
    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    try:
        generate(editor, Request(prompt="make the circle blue", task="i2i", image=picture, num_steps=1))
        generate(editor, Request(prompt="make the circle blue", task="i2i", num_steps=1))
    finally:
        hook.remove()
    assert len(seen) == 4
    (positive, said), (negative, unsaid), (without, plain), _ = seen
    assert torch.equal(positive[:, 16:], negative[:, 16:])
    assert float(positive[:, 16:32].std()) > 0.1
    assert torch.equal(positive[:, 32], torch.ones_like(positive[:, 32]))
    assert torch.equal(without[:, 16:], torch.zeros_like(without[:, 16:]))
    assert said.embeds.shape[1] != plain.embeds.shape[1]
    assert unsaid.embeds.shape[1] >= 1


def test_other_sizes_and_lengths(nano: Models) -> None:
    frames = generate(nano, Request(prompt=PROMPT, width=96, height=48, num_frames=5, num_steps=2)).frames
    assert frames.shape == (1, 5, 48, 96, 3)


def test_cancel_leaves_the_models_usable(nano: Models) -> None:
    def stop(step: int, total: int, latents: torch.Tensor) -> None:
        raise KeyboardInterrupt

    request = Request(prompt=PROMPT, num_steps=2)
    before = generate(nano, request).frames
    with pytest.raises(KeyboardInterrupt):
        generate(nano, request, stop)
    assert torch.equal(generate(nano, request).frames, before)


def test_the_text_encoder_is_seen_as_the_real_one_is(nano: Models) -> None:
    encoder = nano.text_encoder
    from kandinsky5_core.text import templates

    for template in (templates.VIDEO, templates.IMAGE, templates.IMAGE_TO_VIDEO, templates.IMAGE_EDIT):
        assert encoder.crop_of(template) == template.crop
    text = encoder.encode([PROMPT, "a circle"], task="t2v", max_tokens=256)
    assert text.embeds.shape == (2, 256, 128)
    assert int(text.mask[0].sum()) == len(PROMPT.split()) + 1  # and <|im_end|>


def test_score_counts_right_clips(nano: Models) -> None:
    score = score_nano(count=6, seed=901, models=nano)
    assert score["n"] == 6
    assert score["background"] >= 0.8
    assert score["color"] >= 0.6
    request = Request(prompt="a red circle on a gray background", task="t2i", seed=4)
    rows = generate_rows(nano, [request, replace(request, seed=5)])
    assert [tuple(row.shape) for row in rows] == [(1, 64, 64, 3)] * 2
    torch.testing.assert_close(torch.stack(rows), generate(nano, replace(request, batch=2)).frames, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "t2x"}, "task 't2x'"),
        ({"task": "i2i"}, "task 'i2i' with nano-video"),
        ({"task": "i2v"}, "needs an image"),
        ({"width": 60, "height": 64}, "width 60"),
        ({"width": 64}, "only width"),
        ({"num_frames": 16}, "frames 16 .* use 13 or 17"),
        ({"task": "t2i", "num_frames": 17}, "one frame"),
        ({"num_steps": 0}, "steps"),
        ({"shift": -1.0}, "shift"),
        ({"sampler": "dpm"}, "euler, heun, ab2"),
        ({"attention": "sparse"}, "auto, dense, nabla"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"seed": -1}, "seed -1"),
        ({"image": torch.zeros(8, 8, 3)}, "t2v takes no image"),
        ({"task": "t2i", "image": torch.zeros(8, 8, 3)}, "t2i starts from a picture .* only in part"),
    ],
)
def test_bad_requests_name_the_input_and_the_fix(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(replace(Request(prompt=PROMPT), **change), variant("nano-video"))


def test_defaults_come_from_the_variant() -> None:
    for row in VARIANTS.values():
        image = torch.zeros(300, 500, 3) if row.tasks[0] == "i2v" else None
        request = resolve(Request(prompt="x", task=row.tasks[0], image=image), row)
        assert (request.num_steps, request.shift) == (row.sampling.num_steps, row.sampling.shift)
        assert request.num_frames == row.num_frames


def test_images_are_covered_and_cropped() -> None:
    image = torch.zeros(40, 100, 3)
    image[:, 30:70] = 1
    assert torch.equal(cover((40, 100), (40, 40)).to_work(image[None]), torch.ones(1, 40, 40, 3))
    assert cover((7, 5), (64, 96)).to_work(torch.rand(1, 7, 5, 3)).shape == (1, 64, 96, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_command_writes_a_clip_with_its_request(tmp_path: Path, capsys: pytest.CaptureFixture, suffix: str) -> None:
    out = tmp_path / f"clip{suffix}"
    assert main(["generate", "--prompt", PROMPT, "--seed", "5", "--steps", "2", "--out", str(out), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["out"] == str(out)
    assert values["seed"] == 5
    assert values["peak_memory_bytes"] > 1e8
    assert values["settings"]["num_steps"] == 2
    frames, fps = read_video(out)
    assert frames.shape == (17, 64, 64, 3)
    assert fps == pytest.approx(8, rel=0.05)
    request = json.loads(read_metadata(out)["kandinsky5"])
    assert (request["prompt"], request["seed"]) == (PROMPT, 5)
    assert request["model_hash"] == values["model_hash"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--frames", "16"], ["--width", "50", "--height", "64"], ["--task", "i2v"], ["--image", "missing.png"],
        ["--sampler", "nope"], ["--attention", "nope"], ["--model", "missing.safetensors"], ["--device", "nope"],
        ["--steps", "0"], ["--vae-budget", "0"], ["--vae-budget", "0.001"],
        ["--task", "i2v", "--image", "TEXT"], ["--out", "x.avi"],
        ["--out", "/proc/nowhere/x.mp4"], ["--model", "TEXT"],
    ],
)  # fmt: skip
def test_bad_input_ends_with_two_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("kandinsky5_core.commands.load_files", never)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.mp4")]
    assert main(["generate", "--prompt", PROMPT, *out, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert error.startswith("kandinsky5 generate: error: ")
    assert not (tmp_path / "x.mp4").exists()


def test_wrong_option_values_end_with_two_and_one_line(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--dtype", "fp7"], ["--steps", "many"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "--prompt", PROMPT, "--out", "x.mp4", *arguments])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kandinsky5_core.commands.generate", interrupt)
    assert main(["generate", "--prompt", PROMPT, "--out", str(tmp_path / "x.mp4")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_info_and_convert_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from kandinsky5_core.loading import NANO_FOLDER

    dit = NANO_FOLDER / "video" / "dit.safetensors"
    assert main(["info", str(dit), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["variant"]) == ("dit", "nano-video")
    target = tmp_path / "converted.safetensors"
    assert main(["convert", str(dit), str(target), "--layout", "comfyui", "--dtype", "bf16"]) == 0
    assert main(["info", str(target)]) == 0
    assert "comfyui" in capsys.readouterr().out


def test_still_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "still.png"
    arguments = ["generate", "--task", "t2i", "--prompt", "a red circle on a gray background", "--steps", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "kandinsky5" in read_metadata(out)
    first = tmp_path / "first.png"
    write_image(first, torch.rand(64, 64, 3))
    clip = tmp_path / "clip.mp4"
    arguments = ["generate", "--task", "i2v", "--image", str(first), "--prompt", PROMPT, "--steps", "2"]
    assert main([*arguments, "--out", str(clip)]) == 0
    assert clip.exists()


def test_help_does_not_import_torch() -> None:
    code = "import sys, kandinsky5_core.cli as c; c.build_parser().format_help(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
