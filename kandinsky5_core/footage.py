"""Footage of any rate: when its frames are shown, and those nearest to given times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .media import frame_to_rgb, open_video


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A clip's size and the times of its frames, read without decoding."""

    path: Path
    height: int
    width: int
    times: tuple[float, ...]
    """Seconds from the first frame, ascending."""

    @property
    def seconds(self) -> float:
        """Until the last frame's end, which lasts as long as the median frame."""
        if len(self.times) < 2:
            return 0.0
        return self.times[-1] + float(np.median(np.diff(self.times)))

    def num_frames(self, fps: float) -> int:
        """Frames at another rate."""
        return max(1, int(self.seconds * fps + 1e-3)) if len(self.times) > 1 else len(self.times)

    def nearest(self, moments: Sequence[float]) -> list[int]:
        """Index of the frame shown nearest to each moment (seconds)."""
        times = np.asarray(self.times)
        after = np.clip(np.searchsorted(times, moments), 1, max(1, len(times) - 1))
        before = after - 1
        moments = np.asarray(moments)
        if len(times) == 1:
            return [0] * len(moments)
        return np.where(moments - times[before] <= times[after] - moments, before, after).tolist()


def look_at(path: str | Path) -> Footage:
    """Size and frame times of a clip.

    Raises:
        ValueError: not a readable video.
    """
    path = Path(path)
    with open_video(path) as container:
        if not container.streams.video:
            raise ValueError(f"video {path} has no picture in it")
        stream = container.streams.video[0]
        base = float(stream.time_base or 0)
        stamps = sorted(packet.pts * base for packet in container.demux(stream) if packet.pts is not None)
        size = (stream.codec_context.height, stream.codec_context.width)
    if not stamps or 0 in size:
        raise ValueError(f"video {path} holds no frames")
    turned = _is_turned(path)
    height, width = size[::-1] if turned else size
    return Footage(path=path, height=height, width=width, times=tuple(stamp - stamps[0] for stamp in stamps))


def read_frames(footage: Footage, moments: Sequence[float]) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1], those shown nearest to each moment in seconds.

    Raises:
        ValueError: the file holds fewer frames than it said.
    """
    wanted = footage.nearest(moments)
    last, chosen = max(wanted), set(wanted)
    found: dict[int, np.ndarray] = {}
    with open_video(footage.path) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in chosen:
                found[number] = frame_to_rgb(frame)
            if number >= last:
                break
    missing = chosen - found.keys()
    if missing:
        raise ValueError(f"video {footage.path} breaks off: frame {min(missing)} of {len(footage.times)} is not there")
    return torch.stack([torch.from_numpy(found[number]) for number in wanted]).float() / 255


def _is_turned(path: Path) -> bool:
    """The first frame says so: phones store the turn and not the turned picture."""
    with open_video(path) as container:
        for frame in container.decode(container.streams.video[0]):
            return frame.rotation % 180 != 0
    return False
