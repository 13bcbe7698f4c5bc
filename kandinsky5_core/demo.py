"""`kandinsky5 demo`: one of everything that the embedded models can do, as files and one contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .commands import output_paths, step_bar, write_result
from .loading import load
from .media import check_output, write_image
from .nano.drawing import Trajectory, draw
from .nano.language import parse
from .nano.recognise import Sighting, recognise
from .pipeline import Models, Result, generate
from .request import Request
from .sheet import SHEET_COLUMNS, contact_sheet, spread


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One thing that is shown."""

    name: str
    model: str
    request: Request
    given: tuple[Tensor, ...] = ()
    """Pictures (H, W, 3) that the sheet shows before the result."""

    @property
    def file_name(self) -> str:
        """Of the result."""
        return f"{self.name}.{'png' if self.request.task in ('t2i', 'i2i') else 'mp4'}"


def demo_command(folder: Path) -> dict[str, object]:
    """Make everything into `folder`; what was made, and what the recogniser sees in it."""
    check_output(folder / "clip.mp4", 17)
    values: dict[str, object] = {}
    rows: list[tuple[str, list[Tensor]]] = []
    models: dict[str, Models] = {}
    for number, piece in enumerate(demo_pieces(), 1):
        if piece.model not in models:
            models[piece.model] = load(piece.model)
        result = make(models[piece.model], piece.request, folder / f"{number:02d}-{piece.file_name}")
        seen = "; ".join(said(recognise(frames)) for frames in result.frames)
        values[f"{number:02d} {piece.name}"] = f"{piece.request.prompt} -> {seen}"
        frames = result.frames[0] if len(result.frames) == 1 else result.frames[:, 0]
        shown = [*piece.given, *spread(frames, SHEET_COLUMNS - len(piece.given))]
        rows.append((f"{piece.name}: {piece.request.prompt}", shown))
    sheet = folder / "contact-sheet.png"
    write_image(sheet, contact_sheet(rows), {})
    return {**values, "contact sheet": str(sheet), "results": str(folder.resolve())}


def demo_pieces() -> list[Piece]:
    """Clips, pictures, edits; what is given to them is drawn here."""
    return [*_clips(), *_given_frames(), *_pictures()]


def _clips() -> list[Piece]:
    prompts = {
        "text to video": "a big red circle moves left on a black background",
        "text to video, up": "a small yellow triangle moves up on a navy background",
        "at rest": "a big white circle stays still on a brown background",
        "loop": "a big green square stays still on a gray background",
    }
    return [
        Piece(name=name, model="nano-video", request=Request(prompt=prompt, seed=seed, loop=name == "loop"))
        for seed, (name, prompt) in enumerate(prompts.items(), 1)
    ]


def _given_frames() -> list[Piece]:
    prompt = "a big purple square moves down on a black background"
    clip = draw(parse(prompt), Trajectory(start=(32.0, 18.0), end=(32.0, 42.0), radius=11.0), 17, (64, 64))
    away = "a big white triangle moves right on a brown background"
    old = draw(parse(away), Trajectory(start=(16.0, 32.0), end=(42.0, 32.0), radius=11.0), 17, (64, 64))
    recolor = "a big yellow square moves down on a black background"
    mask = (clip - clip[0, 0, 0]).abs().amax(-1).amax(0).gt(0.05).float()
    return [
        Piece(name="image to video", model="nano-video", given=(clip[0],),
              request=Request(prompt=prompt, task="i2v", image=clip[0], seed=5)),
        Piece(name="first and last frame", model="nano-video", given=(clip[0], clip[-1]),
              request=Request(prompt=prompt, task="i2v", keyframes={0: clip[0], -1: clip[-1]}, seed=6)),
        Piece(name="going on from five frames", model="nano-video", given=(old[0],),
              request=Request(prompt=away, task="i2v", extend=old[:5], seed=7)),
        Piece(name="video to video under a mask", model="nano-video", given=(clip[0],),
              request=Request(prompt=recolor, video=clip, mask=mask, mask_grow=3, seed=8)),
    ]  # fmt: skip


def _pictures() -> list[Piece]:
    prompt = "a big blue triangle on a gray background"
    picture = still("a big red circle on a gray background", (32.0, 32.0), 11.0)
    mask = torch.zeros(64, 64)
    mask[15:49, 15:49] = 1
    edits = ("make the circle yellow", "change the background to navy", "turn the circle into a square",
             "remove the circle")  # fmt: skip
    pieces = [
        Piece(name="text to image", model="nano-image", request=Request(prompt=prompt, task="t2i", seed=9)),
        Piece(name="a batch of a wide size", model="nano-image",
              request=Request(prompt=prompt, task="t2i", seed=9, batch=4, width=96, height=64)),
        Piece(name="inpainting", model="nano-image", given=(picture, mask[..., None].expand(-1, -1, 3)),
              request=Request(prompt=prompt, task="t2i", image=picture, mask=mask, seed=10)),
        Piece(name="outpainting", model="nano-image", given=(picture,),
              request=Request(prompt="a big red circle on a gray background", task="t2i", image=picture,
                              outpaint=(16, 0, 16, 0), seed=11)),
        Piece(name="partial noise", model="nano-image", given=(picture,),
              request=Request(prompt=prompt, task="t2i", image=picture, denoise=0.6, seed=12)),
    ]  # fmt: skip
    return pieces + [
        Piece(name="edit", model="nano-edit", given=(picture,),
              request=Request(prompt=edit, task="i2i", image=picture, seed=seed))
        for seed, edit in enumerate(edits, 13)
    ]  # fmt: skip


def still(prompt: str, centre: tuple[float, float], radius: float) -> Tensor:
    """A drawn 64x64 picture of a sentence."""
    return draw(parse(prompt), Trajectory(start=centre, end=centre, radius=radius), 1, (64, 64))[0]


def make(models: Models, request: Request, path: Path) -> Result:
    """Generate one clip, or a batch of pictures, into files."""
    with step_bar() as on_step:
        result = generate(models, request, on_step)
    for row, target in enumerate(output_paths(path, request.batch)):
        write_result(target, result, models.model_hash, row)
    return result


def said(sighting: Sighting) -> str:
    """What was recognised, in a few words."""
    if sighting.is_empty:
        return f"nothing on {sighting.background}"
    return f"{sighting.color} {sighting.shape}, {sighting.motion}, on {sighting.background}"
