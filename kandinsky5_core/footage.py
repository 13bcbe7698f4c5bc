"""Footage of any rate: when its frames are shown, and those nearest to given times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .media import frame_to_rgb, open_video

_SLACK = 1e-6
"""Seconds by which two clocks may differ through rounding."""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A clip's size and the times of its frames, read without decoding more than one."""

    path: Path
    height: int
    width: int
    times: tuple[float, ...]
    """Seconds from the first frame, ascending."""
    start: float = 0.0
    """Of the first frame by the file's own clock, in seconds."""

    @property
    def interval(self) -> float:
        """Median time between two frames; 0 for a single one."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0

    @property
    def seconds(self) -> float:
        """Until the last frame's end, which lasts as long as the median frame."""
        return self.times[-1] + self.interval

    def num_frames(self, fps: float) -> int:
        """Frames at another rate."""
        return max(1, int(self.seconds * fps + 1e-3))

    def nearest(self, moments: Sequence[float]) -> list[int]:
        """Index of the frame shown nearest to each moment (seconds); of two, the earlier."""
        times = np.asarray(self.times)
        after = np.searchsorted(times, moments).clip(max=len(times) - 1)
        before = (after - 1).clip(min=0)
        wanted = np.asarray(moments)
        earlier = np.abs(wanted - times[before]) <= np.abs(times[after] - wanted) + _SLACK
        return np.where(earlier, before, after).tolist()


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
        first = next(iter(container.decode(stream)), None)
    if first is None:
        raise ValueError(f"video {path} holds no frames")
    times = _times(path, first.time)
    height, width = frame_size(first)
    start = first.time or 0.0
    return Footage(path=path, height=height, width=width, start=start, times=times)


def _times(path: Path, start: float | None) -> tuple[float, ...]:
    """Of all frames that are shown, from the first."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        packets = [(packet.pts, packet.dts) for packet in container.demux(stream) if packet.size]
        base = float(stream.time_base)
    shown = sorted({pts * base for pts, _ in packets if pts is not None})
    if start is not None and len(shown) == len(packets):
        # What lies before the first frame is cut away by the container.
        return tuple(time - start for time in shown if time >= start - _SLACK)
    # Some containers tell only when a packet is decoded, and not when it is shown: as many, in another order.
    decoded = sorted({dts * base for _, dts in packets if dts is not None}) or [0.0]
    return tuple(time - decoded[0] for time in decoded)


def frame_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) the right way up: phones store the turn and not the turned picture."""
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def read_frames(footage: Footage, moments: Sequence[float]) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1], those shown nearest to each moment in seconds.

    Decoding begins at the last key frame before the first of them.

    Raises:
        ValueError: the file ends before it said.
    """
    wanted = [footage.times[index] for index in footage.nearest(moments)]
    found: dict[float, np.ndarray] = {}
    queue = sorted(set(wanted))
    previous: tuple[float, av.VideoFrame] | None = None
    for time, frame in _decoded(footage, queue[0]):
        while queue and time > queue[0] - _SLACK:
            # Frames that are never shown have times too: then the nearest that was decoded is taken.
            late = previous is not None and queue[0] - previous[0] <= time - queue[0]
            found[queue.pop(0)] = frame_to_rgb(previous[1] if late else frame)
        previous = time, frame
        if not queue:
            break
    if queue and previous is not None and queue[-1] - previous[0] <= 2 * footage.interval + _SLACK:
        found.update(dict.fromkeys(queue, frame_to_rgb(previous[1])))
        queue = []
    if queue:
        raise ValueError(
            f"video {footage.path} breaks off: it ends before {queue[0]:.3f} of its {footage.seconds:.3f} seconds"
        )
    return torch.stack([torch.from_numpy(found[time]) for time in wanted]).float() / 255


def _decoded(footage: Footage, since: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the first frame, frame) in the order shown, from `since` or earlier."""
    if since > 0:
        with open_video(footage.path) as container:
            begun = False
            for time, frame in _frames(container, footage, since):
                if not begun and time > since + _SLACK:
                    break  # the index leads behind the place: from the beginning then
                begun = True
                yield time, frame
            if begun:
                return
    with open_video(footage.path) as container:
        yield from _frames(container, footage, None)


def _frames(
    container: av.container.InputContainer, footage: Footage, since: float | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if since is not None:
        try:
            container.seek(int((footage.start + since) / stream.time_base), stream=stream)
        except av.FFmpegError:
            return
    for number, frame in enumerate(container.decode(stream)):
        if frame.time is None and since is not None:
            return
        # Without a clock of their own, frames come in the order of the packets' times.
        time = footage.times[min(number, len(footage.times) - 1)] if frame.time is None else frame.time - footage.start
        yield time, frame
