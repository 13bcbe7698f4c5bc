"""Clips of any rate: the frames nearest to given times, wherever they lie in the file."""

import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kandinsky5_core import footage as footage_module
from kandinsky5_core.footage import Footage, look_at, read_frames
from kandinsky5_core.media import read_video, write_video
from tests.train.material import levels_of, timed_clip

RATES = [Fraction(24_000, 1001), Fraction(24), Fraction(25), Fraction(30), Fraction(60), Fraction(8)]


def write(path: Path, times: Sequence[Fraction | float]) -> list[float]:
    """A clip whose grey says the number of the frame; the levels."""
    levels = [0.1 + 0.8 * number / len(times) for number in range(len(times))]
    timed_clip(path, times, levels)
    return levels


def shown(levels: Sequence[float], frames: torch.Tensor) -> list[int]:
    """Numbers of the frames, by their grey."""
    return [int(np.abs(np.asarray(levels) - level).argmin()) for level in levels_of(frames)]


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_any_rate_gives_the_frames_nearest_in_time(tmp_path: Path, rate: Fraction) -> None:
    times = [number / rate for number in range(40)]
    levels = write(tmp_path / "a.mp4", times)
    footage = look_at(tmp_path / "a.mp4")
    assert footage.num_frames(24) == int(Fraction(40) / rate * 24)
    moments = [number / 24 for number in range(footage.num_frames(24))]
    # Ties aside, the nearest frame is unique; at a tie, the earlier.
    expected = [min(range(40), key=lambda index: (abs(round(times[index] - moment, 5)), index)) for moment in moments]
    assert shown(levels, read_frames(footage, moments)) == expected


def test_a_variable_rate_goes_by_the_clock_and_not_by_the_count(tmp_path: Path) -> None:
    rng = random.Random(3)
    times = [0.0]
    while len(times) < 30:
        times.append(round(times[-1] + rng.choice([1 / 60, 1 / 30, 1 / 10, 1 / 3]), 4))
    levels = write(tmp_path / "a.mkv", times)
    footage = look_at(tmp_path / "a.mkv")
    assert footage.times == pytest.approx(times, abs=1e-3)
    moments = [number / 24 for number in range(footage.num_frames(24))]
    found = shown(levels, read_frames(footage, moments))
    assert found == [int(np.abs(np.asarray(footage.times) - moment).argmin()) for moment in moments]
    assert max(found.count(number) for number in found) >= 7  # a third of a second


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif", ".avi"])
def test_every_container_gives_the_frames_that_decoding_in_order_gives(tmp_path: Path, suffix: str) -> None:
    frames = torch.rand(1, 1, 1, 3).expand(30, 48, 64, 3).clone()
    for number in range(30):
        frames[number, :, 2 * number : 2 * number + 6] = 1.0 - frames[0, 0, 0]
    path = tmp_path / f"a{suffix}"
    if suffix in (".mp4", ".webm", ".gif"):
        write_video(path, frames, 12.5)
    else:
        encode(path, frames)
    whole, rate = read_video(path)
    footage = look_at(path)
    assert rate == pytest.approx(12.5) and len(footage.times) == 30 and (footage.height, footage.width) == (48, 64)
    moments = [number / 12.5 for number in range(30)]
    assert torch.equal(read_frames(footage, moments), whole.float() / 255)
    for start in (1, 11, 12, 13, 28):
        assert torch.equal(read_frames(footage, moments[start : start + 2]), whole[start : start + 2].float() / 255)
    backwards = [moments[20], moments[3], moments[20]]
    assert torch.equal(read_frames(footage, backwards), whole[[20, 3, 20]].float() / 255)


def encode(path: Path, frames: torch.Tensor) -> None:
    """With B-frames and a key frame every 12."""
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25, 2), options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            array = (frame.numpy() * 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))


def test_a_late_window_does_not_decode_the_whole_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mkv"
    encode(path, torch.rand(240, 48, 64, 3))
    footage = look_at(path)
    decoded = []
    frames_of = footage_module._frames

    def counting(container, footage, since):
        for time, frame in frames_of(container, footage, since):
            decoded.append(time)
            yield time, frame

    monkeypatch.setattr(footage_module, "_frames", counting)
    read_frames(footage, [200 / 12.5])
    assert 1 <= len(decoded) <= 14


def test_a_turned_clip_has_the_size_it_is_seen_at(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = torch.zeros(9, 48, 64, 3)
    frames[:, :12] = 1.0  # a bright edge at the top
    write_video(path, frames, 8)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    footage = look_at(path)
    assert (footage.height, footage.width) == (64, 48)
    turned = read_frames(footage, [0.5])[0]
    assert turned.shape == (64, 48, 3)
    # Turned by 90 degrees clockwise the bright edge is at the right.
    assert turned[:, -8:].mean() > 0.9 and turned[:, :24].mean() < 0.1


def test_a_file_that_breaks_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, [number / 24 for number in range(48)])
    footage = Footage(path=path, height=64, width=64, times=tuple(number / 24 for number in range(96)))
    with pytest.raises(ValueError, match=r"breaks off: it ends before 3\.000"):
        read_frames(footage, [0.0, 3.0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        read_frames(look_at(path), [0.0, 1.9])


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read"):
        look_at(tmp_path / "a.mp4")


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no picture in it"):
        look_at(path)


def test_a_single_frame_is_one_frame(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", [0.0])
    footage = look_at(tmp_path / "a.mp4")
    assert footage.num_frames(24) == 1 and footage.nearest([0.0, 5.0]) == [0, 0]
    assert len(read_frames(footage, [0.0, 0.2])) == 2
