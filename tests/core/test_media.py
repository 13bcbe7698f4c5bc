"""Files written and read back: pictures, timing, metadata, and nothing half-written."""

import shutil
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5_core import media
from kandinsky5_core.media import (
    check_output,
    read_image,
    read_metadata,
    read_video,
    to_uint8,
    write_image,
    write_video,
)

METADATA = {"prompt": 'a "small" красный круг \\ ✓\nmoves', "seed": "7", "settings": '{"steps": 20}' * 50}
VIDEO = pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])


def clip(num_frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """A bright square moving over a flat ground."""
    frames = torch.tensor([0.1, 0.2, 0.5]).expand(num_frames, height, width, 3).clone()
    for t in range(num_frames):
        frames[t, 8:24, 4 * t : 4 * t + 16] = torch.tensor([0.9, 0.15, 0.3])
    return frames


@VIDEO
@pytest.mark.parametrize("fps", [8, 24])
def test_a_video_comes_back(tmp_path, suffix, fps):
    frames = clip()
    path = tmp_path / "new" / "folder" / f"clip{suffix.upper()}"
    write_video(path, frames, fps, METADATA)
    back, rate = read_video(path)
    assert back.dtype == torch.uint8 and back.shape == frames.shape
    assert rate == pytest.approx(fps, rel=0.03 if suffix == ".gif" else 1e-6)
    assert read_metadata(path) == METADATA
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    error = back.float() / 255 - frames
    assert error.pow(2).mean().sqrt() < 0.03
    # Away from the square the colour is flat, and a wrong matrix or range would show.
    assert error[:, 32:].abs().max() < 0.02


@VIDEO
def test_bytes_and_floats_make_the_same_file(tmp_path, suffix):
    frames = clip()
    write_video(tmp_path / f"a{suffix}", frames, 8)
    write_video(tmp_path / f"b{suffix}", to_uint8(frames), 8)
    assert torch.equal(read_video(tmp_path / f"a{suffix}")[0], read_video(tmp_path / f"b{suffix}")[0])


@VIDEO
def test_frames_that_do_not_change_are_all_kept(tmp_path, suffix):
    path = tmp_path / f"still{suffix}"
    write_video(path, torch.full((7, 32, 32, 3), 0.5), 10)
    back, rate = read_video(path)
    assert len(back) == 7 and rate == pytest.approx(10)
    assert (back.float() - 127.5).abs().max() < 3


def test_gif_durations_add_up(tmp_path):
    path = tmp_path / "clip.gif"
    write_video(path, clip(24), 24)
    with Image.open(path) as image:
        assert image.n_frames == 24 and image.info["loop"] == 0
        durations = []
        for index in range(24):
            image.seek(index)
            durations.append(image.info["duration"])
    assert sum(durations) == 1000 and set(durations) == {40, 50}


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".webm", "vp9")])
def test_video_streams_are_what_players_expect(tmp_path, suffix, codec):
    path = tmp_path / f"red{suffix}"
    write_video(path, torch.tensor([1.0, 0.0, 0.0]).expand(3, 32, 32, 3), 24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
        assert stream.codec_context.colorspace == 1 and stream.codec_context.color_range == 1
        luma = np.asarray(next(container.decode(stream)).planes[0])
        # BT.709, limited range; BT.601 would give 81.
        assert luma[0] == pytest.approx(16 + 219 * 0.2126, abs=2)


def test_an_image_comes_back_exactly(tmp_path):
    image = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "image.png"
    write_image(path, image, METADATA)
    assert torch.equal(to_uint8(read_image(path)), to_uint8(image))
    assert read_metadata(path) == METADATA
    write_video(path, image[None], 24)
    assert torch.equal(to_uint8(read_image(path)), to_uint8(image))
    assert read_metadata(path) == {}


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([0.5]).bfloat16()).tolist() == [128]
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_cut_off_at_its_end_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, error):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"old")
    sizes = []

    def break_off(part, target):
        sizes.append(part.stat().st_size)
        assert target == path and part.parent == path.parent
        raise error

    monkeypatch.setattr(Path, "replace", break_off)
    with pytest.raises(error):
        write_video(path, clip(1 if suffix == ".png" else 9), 8)
    assert sizes[0] > 100 and [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_write_cut_off_in_the_middle_leaves_nothing(tmp_path, monkeypatch, suffix):
    calls = []

    def break_off(frame):
        calls.append(len(list(tmp_path.iterdir())))
        if len(calls) == 150:
            raise KeyboardInterrupt
        return to_uint8(frame)

    monkeypatch.setattr(media, "to_uint8", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / f"clip{suffix}", torch.rand(160, 16, 16, 3), 8)
    assert calls[-1] == 1 and not list(tmp_path.iterdir())


def test_a_turned_video_is_read_upright(tmp_path):
    path = tmp_path / "turned.mp4"
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:8, :8] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    frames, _ = read_video(path)
    expected = torch.from_numpy(np.rot90(picture).copy())
    assert frames.shape == (1, 48, 32, 3)
    assert (frames[0].float() - expected.float()).abs().mean() < 5


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("a.avi", torch.zeros(1, 8, 8, 3), 8, r"suffix '\.avi'; known ones are \.mp4, \.webm, \.gif, \.png"),
        ("a", torch.zeros(1, 8, 8, 3), 8, "suffix ''; known ones"),
        ("a.png", torch.zeros(2, 8, 8, 3), 8, "one frame, not 2"),
        ("a.mp4", torch.zeros(3, 8, 8), 8, r"shape \(3, 8, 8\)"),
        ("a.mp4", torch.zeros(1, 3, 8, 8), 8, r"expected \(T, H, W, 3\)"),
        ("a.mp4", torch.zeros(0, 8, 8, 3), 8, r"shape \(0, 8, 8, 3\)"),
        ("a.mp4", torch.zeros(1, 8, 8, 3).long(), 8, "int64"),
        ("a.mp4", torch.zeros(1, 8, 8, 3), 0, "fps 0"),
        ("a.mp4", torch.zeros(1, 9, 8, 3), 8, "8x9 has an odd side"),
        ("a.gif", torch.full((1, 8, 8, 3), float("inf")), 8, "not finite"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"must end in \.png"):
        write_image(tmp_path / "image.jpg", torch.zeros(8, 8, 3))


def test_outputs_are_checked_without_making_anything(tmp_path):
    for name, num_frames in (("a.mp4", 121), ("deep/er/a.webm", 17), ("a.gif", 17), ("a.PNG", 1)):
        check_output(tmp_path / name, num_frames)
        check_output(str(tmp_path / name), num_frames)
    assert not list(tmp_path.iterdir())


def test_bad_outputs_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"suffix '\.mov'"):
        check_output(tmp_path / "a.mov", 1)
    with pytest.raises(ValueError, match="one frame, not 17"):
        check_output(tmp_path / "a.png", 17)
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "folder.mp4", 1)
    with pytest.raises(ValueError, match="cannot be written"):
        check_output(tmp_path / "file" / "a.mp4", 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 2**25, 2**25))
    check_output(tmp_path / "a.mp4", 17, height=64, width=64)
    with pytest.raises(ValueError, match=r"may take \d+ MiB and .* has 32 MiB free"):
        check_output(tmp_path / "a.mp4", 241, height=768, width=1280)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_an_unwritable_folder_is_named():
    with pytest.raises(ValueError, match=r"cannot be written.*/proc"):
        check_output("/proc/a.mp4", 1)


def test_images_are_turned_as_their_exif_says(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.shape == (6, 4, 3) and image[0, 3].tolist() == [1, 1, 1] and image.sum() == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    rgba = np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    image = Image.fromarray(rgba)
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
        image.putpalette([9, 9, 9, 255, 0, 0])
        image.info["transparency"] = 0
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    assert pixels[0, 0].tolist() == [1, 1, 1]
    if mode != "LA":
        assert pixels[0, 1].tolist() == [1, 0, 0]
    if mode != "P":
        torch.testing.assert_close(pixels[0, 2], torch.full((3,), 127 / 255), atol=0.005, rtol=0)


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = torch.tensor([0, 1 / 255, 32768 / 65535, 1.0])
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (1, 4, 3) and image.dtype == torch.float32
    torch.testing.assert_close(image, expected[None, :, None].expand(1, 4, 3))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode):
    Image.new("RGB", (5, 4), "white").convert(mode).save(tmp_path / "image.tiff")
    torch.testing.assert_close(read_image(tmp_path / "image.tiff"), torch.ones(4, 5, 3), atol=0.01, rtol=0)


def test_what_is_no_still_image_is_refused(tmp_path):
    write_video(tmp_path / "moves.gif", clip(3), 8)
    with pytest.raises(ValueError, match=r"moves\.gif has 3 frames"):
        read_image(tmp_path / "moves.gif")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png is not in a format"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"missing\.png cannot be read: No such file"):
        read_image(tmp_path / "missing.png")
    write_image(tmp_path / "whole.png", torch.rand(64, 64, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        read_image(tmp_path / "cut.png")
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_image(tmp_path / "float.tiff")


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for path in (tmp_path / "text.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
            read_video(path)
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
            read_metadata(path)


def test_a_foreign_comment_is_not_lost(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", comment="made by hand")
    assert read_metadata(tmp_path / "a.gif") == {"comment": "made by hand"}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert read_metadata(tmp_path / "b.png") == {}
