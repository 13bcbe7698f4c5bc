"""`kandinsky5 demo`: what the embedded models make of some prompts, as clips and one contact sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .commands import step_bar, write_result
from .loading import load
from .media import check_output, write_image
from .nano.drawing import Trajectory, draw
from .nano.language import parse
from .nano.recognise import Sighting, recognise
from .pipeline import Models, Result, generate
from .request import Request

PROMPTS = (
    "a big red circle moves left on a black background",
    "a small yellow triangle moves up on a navy background",
    "a green square moves right on a gray background",
    "a big white circle stays still on a brown background",
)
I2V_PROMPT = "a big purple square moves down on a black background"
T2I_PROMPT = "a big blue triangle on a gray background"
SHEET_COLUMNS = 5
CELL = 128
"""Side of one picture on the sheet, in pixels."""


def demo_command(folder: Path) -> dict[str, object]:
    """Make every clip into `folder`; what was made, and what the recogniser sees in it."""
    requests = demo_requests()
    check_output(folder / "01.mp4", 17)
    models = load("nano-video")
    values: dict[str, object] = {}
    rows = []
    for number, request in enumerate(requests, 1):
        path = folder / f"{number:02d}-{request.task}.{'png' if request.task == 't2i' else 'mp4'}"
        result = make(models, request, path)
        rows.append(result.frames[0])
        values[path.name] = f"{request.prompt} -> {said(recognise(result.frames[0]))}"
    sheet = folder / "contact-sheet.png"
    write_image(sheet, contact_sheet(rows), {})
    return {**values, "contact sheet": str(sheet), "results": str(folder.resolve())}


def demo_requests() -> list[Request]:
    """Text to video, image to video and text to image."""
    scene = parse(I2V_PROMPT)
    first = draw(scene, Trajectory(start=(32.0, 18.0), end=(32.0, 42.0), radius=11.0), 17, (64, 64))[0]
    clips = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS, 1)]
    return [
        *clips,
        Request(prompt=I2V_PROMPT, task="i2v", image=first, seed=5),
        Request(prompt=T2I_PROMPT, task="t2i", seed=6),
    ]


def make(models: Models, request: Request, path: Path) -> Result:
    """Generate one clip into a file."""
    with step_bar() as on_step:
        result = generate(models, request, on_step)
    write_result(path, result, models.model_hash)
    return result


def said(sighting: Sighting) -> str:
    """What was recognised, in a few words."""
    return f"{sighting.color} {sighting.shape}, {sighting.motion}, on {sighting.background}"


def contact_sheet(clips: list[Tensor]) -> Tensor:
    """(rows*CELL, columns*CELL, 3): a row a clip, frames spread evenly over it; a still fills its first cell."""
    rows = []
    for clip in clips:
        count = min(SHEET_COLUMNS, len(clip))
        picks = torch.linspace(0, len(clip) - 1, count).round().long()
        cells = torch.nn.functional.interpolate(clip[picks].permute(0, 3, 1, 2), size=(CELL, CELL), mode="nearest")
        blank = torch.ones(SHEET_COLUMNS - count, 3, CELL, CELL)
        rows.append(torch.cat(list(torch.cat([cells, blank])), dim=2))
    return torch.cat(rows, dim=1).permute(1, 2, 0)
