"""Read and write video and images, with the request that made them kept inside the file.

Shapes: frames (T, H, W, 3) and images (H, W, 3), RGB; floats in [0, 1] or uint8.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

COMMENT = "comment"
"""Metadata is one JSON object in this field, which all four formats have."""
_SPARE_BYTES = 16 * 2**20
_BT709 = 1


@dataclass(frozen=True, kw_only=True)
class _Format:
    write: Callable[[Path, Tensor, Fraction, str], None]
    """(path, frames, frames per second, comment)"""
    bytes_per_pixel: float
    """What the file takes at most, to see whether it will fit on the disk."""


def check_output(path: str | Path, num_frames: int, *, height: int = 1024, width: int = 1024) -> None:
    """Refuse an output path before any long work is done for it; creates nothing that stays.

    Raises:
        ValueError: unknown suffix, .png for more than one frame, a folder that cannot be made or written to, or
            too little room on the disk for `num_frames` of `height` x `width` pixels.
    """
    path = Path(path)
    file_format = _format_of(path)
    if path.suffix.lower() == ".png" and num_frames != 1:
        raise ValueError(f"output {path} holds one frame, not {num_frames}; use .mp4, .webm or .gif for video")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"output {path} cannot be written: {error.strerror or error} ({folder})") from error
    needed = _SPARE_BYTES + math.ceil(num_frames * height * width * file_format.bytes_per_pixel)
    if free < needed:
        raise ValueError(
            f"output {path} may take {needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free; "
            "make room or choose another disk"
        )


def write_video(path: str | Path, frames: Tensor, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write (T, H, W, 3) frames as .mp4 (H.264), .webm (VP9), .gif or, a single frame, .png: the suffix decides.

    The file appears under its name only when it is complete; missing folders are made.

    Raises:
        ValueError: unknown suffix, frames of another shape or that are not finite, odd sizes for mp4 and webm, fps not
            positive, or several frames for .png.
    """
    path = Path(path)
    file_format = _format_of(path)
    _check_frames(frames)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps {fps} must be above 0")
    rate = Fraction(fps).limit_denominator(1001)
    comment = json.dumps(dict(metadata or {}))
    with _appears_when_done(path) as part:
        file_format.write(part, frames, rate, comment)


def write_image(path: str | Path, image: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Write an (H, W, 3) image as .png.

    Raises:
        ValueError: another suffix or shape, or values that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"image {path} must end in .png")
    write_video(path, image[None], 1, metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `write_video` or `write_image` put into a file; empty if it has none.

    A comment by another program comes back as {'comment': text}.

    Raises:
        ValueError: not a readable file of a known suffix.
    """
    path = Path(path)
    _format_of(path)
    is_video = path.suffix.lower() in (".mp4", ".webm")
    comment = _video_comment(path) if is_video else _image_comment(path)
    if comment is None:
        return {}
    try:
        metadata = json.loads(comment)
    except ValueError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {COMMENT: comment}


def read_image(path: str | Path) -> Tensor:
    """An image file as (H, W, 3) fp32 in [0, 1], turned as its EXIF says, transparent parts on white.

    16-bit greyscale keeps its precision; 16-bit colour is read as 8-bit.

    Raises:
        ValueError: not a readable image, an animated one, or a kind of pixel with no known range.
    """
    with _open_image(Path(path)) as image:
        # A phone's MPO is a still picture with a second view or a depth map after it.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"image {path} has {image.n_frames} frames; give a still image")
        return torch.from_numpy(_to_rgb(ImageOps.exif_transpose(image), path))


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """All frames of a video (T, H, W, 3) uint8, and its frames per second.

    Raises:
        ValueError: not a readable video.
    """
    with open_video(Path(path)) as container:
        if not container.streams.video:
            raise ValueError(f"video {path} has no picture in it")
        stream = container.streams.video[0]
        frames, times = [], []
        for frame in container.decode(stream):
            frames.append(torch.from_numpy(frame_to_rgb(frame)))
            times.append(frame.time)
        rate = stream.average_rate or stream.guessed_rate
    if not frames or not rate:
        raise ValueError(f"video {path} holds no frames")
    if stream.name == "gif" and len(frames) > 1:
        # The average is over rounded durations there, and without the last.
        rate = (len(frames) - 1) / (times[-1] - times[0])
    return torch.stack(frames), float(rate)


def to_uint8(frames: Tensor) -> Tensor:
    """Floats in [0, 1] as bytes, clamped and rounded; bytes stay as they are.

    Raises:
        ValueError: a value is not finite, which is what a model gone wrong produces.
    """
    if frames.dtype == torch.uint8:
        return frames
    if not torch.isfinite(frames).all():
        raise ValueError("frames hold values that are not finite (NaN or infinity); the model's output is broken")
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _format_of(path: Path) -> _Format:
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"file {path} has suffix '{path.suffix}'; known ones are {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; expected (T, H, W, 3)")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(f"frames have dtype {frames.dtype}; use floats in [0, 1] or uint8")


@contextmanager
def _appears_when_done(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` on success, removed on any way out but that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _arrays(frames: Tensor) -> Iterator[np.ndarray]:
    # One frame at a time: a long clip in bytes as well would cost a quarter of its floats again.
    for frame in frames:
        yield np.ascontiguousarray(to_uint8(frame).cpu().numpy())


def _write_mp4(path: Path, frames: Tensor, rate: Fraction, comment: str) -> None:
    # The index at the front lets a browser start before it has the whole file.
    _encode(path, frames, rate, comment, "mp4", "libx264", {"crf": "17", "preset": "medium"}, {"movflags": "faststart"})


def _write_webm(path: Path, frames: Tensor, rate: Fraction, comment: str) -> None:
    options = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "2", "row-mt": "1"}
    _encode(path, frames, rate, comment, "webm", "libvpx-vp9", options, {})


def _encode(
    path: Path, frames: Tensor, rate: Fraction, comment: str, container_format: str, codec: str,
    codec_options: dict[str, str], container_options: dict[str, str],
) -> None:  # fmt: skip
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"video size {width}x{height} has an odd side; {container_format} needs even ones")
    with av.open(str(path), "w", format=container_format, options=container_options) as container:
        container.metadata[COMMENT] = comment
        stream = container.add_stream(codec, rate=rate, options=codec_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        # Said in the file, for players guess the colours of small videos otherwise.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for array in _arrays(frames):
            container.mux(stream.encode(_to_yuv(array)))
        container.mux(stream.encode(None))


def _to_yuv(array: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


def frame_to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, the right way up."""
    array = frame.to_ndarray(format="rgb24")
    # Phones store the turn and not the turned picture.
    return np.ascontiguousarray(np.rot90(array, frame.rotation // 90))


def _write_gif(path: Path, frames: Tensor, rate: Fraction, comment: str) -> None:
    images: list[Image.Image] = []
    for array in _arrays(frames):
        images.append(_unlike(images[-1] if images else None, Image.fromarray(array).quantize(256)))
    # GIF counts in hundredths of a second: rounding the times, not the durations, keeps the clip's length.
    times = [round(Fraction(100 * i) / rate) for i in range(len(images) + 1)]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], loop=0, comment=comment.encode(), optimize=False,
        duration=[10 * max(1, after - before) for before, after in itertools.pairwise(times)],
    )  # fmt: skip


def _unlike(previous: Image.Image | None, image: Image.Image) -> Image.Image:
    """`image`, with its rarest colour moved by the least step if it equals `previous`: Pillow drops such frames."""
    if previous is not None and image.convert("RGB").tobytes() == previous.convert("RGB").tobytes():
        palette = image.getpalette()
        _, rarest = min(image.getcolors())
        palette[3 * rarest + 2] ^= 1
        image.putpalette(palette)
    return image


def _write_png(path: Path, frames: Tensor, _rate: Fraction, comment: str) -> None:
    if len(frames) != 1:
        raise ValueError(f"a .png holds one frame, not {len(frames)}; use .mp4, .webm or .gif for video")
    info = PngInfo()
    info.add_text(COMMENT, comment)
    Image.fromarray(next(_arrays(frames))).save(path, format="PNG", pnginfo=info)


_FORMATS = {
    ".mp4": _Format(write=_write_mp4, bytes_per_pixel=0.5),
    ".webm": _Format(write=_write_webm, bytes_per_pixel=0.5),
    ".gif": _Format(write=_write_gif, bytes_per_pixel=1.5),
    ".png": _Format(write=_write_png, bytes_per_pixel=3.1),
}


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"image {path} is not in a format that can be read") from error
    except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def open_video(path: Path) -> Iterator[av.container.InputContainer]:
    """The container of a video file.

    Raises:
        ValueError: it cannot be read, whenever that shows.
    """
    try:
        with av.open(str(path)) as container:
            yield container
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"video {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    if image.mode.startswith("I"):
        # Pillow's own conversion to RGB would clip at 255.
        grey = np.asarray(image).astype(np.float32) / 65535
        if grey.max() > 1 or grey.min() < 0:
            raise ValueError(f"image {path} has 32-bit pixels beyond 65535; save it with 8 or 16 bits")
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError(f"image {path} has floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _image_comment(path: Path) -> str | None:
    with _open_image(path) as image:
        comment = image.info.get(COMMENT)
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment


def _video_comment(path: Path) -> str | None:
    with open_video(path) as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}
    return tags.get(COMMENT)
