"""Training material for the tests: pictures, clips and edit pairs of the drawing program, as a user would have them."""

import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from kandinsky5_core.media import to_uint8, write_video
from kandinsky5_core.nano.drawing import random_clip, random_pair
from kandinsky5_core.nano.edits import instruction
from kandinsky5_core.nano.language import caption


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64), words: str | None = "") -> str:
    """A drawn picture in the format of its suffix, with its caption beside it (`words`, or the scene's; None: none)."""
    scene, frames = random_clip(random.Random(seed), 1, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(frames[0]).numpy()).save(path, **({"quality": 95} if path.suffix != ".png" else {}))
    return _caption(path, words or caption(scene) if words is not None else None)


def clip(
    path: Path, seed: int = 0, num_frames: int = 17, size: tuple[int, int] = (64, 64), fps: float = 8.0,
    words: str | None = "",
) -> str:  # fmt: skip
    """A drawn clip in the format of its suffix."""
    scene, frames = random_clip(random.Random(seed), num_frames, size)
    write_video(path, frames, fps)
    return _caption(path, words or caption(scene) if words is not None else None)


def pair(folder: Path, name: str, seed: int = 0, size: tuple[int, int] = (64, 64)) -> str:
    """A drawn edit in `source/` and `target/` below the folder; its instruction."""
    _, edit, before, after = random_pair(random.Random(seed), size)
    for side, shown in (("source", before), ("target", after)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(shown).numpy()).save(folder / side / f"{name}.png")
    (folder / "target" / f"{name}.txt").write_text(instruction(edit), encoding="utf-8")
    return instruction(edit)


def timed_clip(path: Path, times: Sequence[Fraction | float], levels: Sequence[float], side: int = 64) -> None:
    """A clip of flat grey frames, each shown from its own time on (seconds): any rate, also a variable one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = Fraction(1, 90_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "preset": "veryfast"})
        stream.width = stream.height = side
        stream.pix_fmt, stream.time_base = "yuv420p", base
        stream.codec_context.time_base = base
        for time, level in zip(times, levels, strict=True):
            array = np.full((side, side, 3), round(255 * level), np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(Fraction(time) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def levels_of(frames: torch.Tensor) -> list[float]:
    """Mean grey of each frame (F, H, W, 3)."""
    return frames.mean(dim=(1, 2, 3)).tolist()


def _caption(path: Path, words: str | None) -> str:
    if words is not None:
        path.with_suffix(".txt").write_text(words, encoding="utf-8")
    return words or ""
