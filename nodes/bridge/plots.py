"""A job's loss and samples as IMAGE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kandinsky5_core.sheet import SHEET_COLUMNS, contact_sheet, spread
from .jobs import sample_frames

ROWS = 8
"""Times of making samples that a sheet shows, evenly chosen."""


def loss_plot(records: list[dict[str, Any]]) -> Tensor:
    """(1, H, W, 3): raw and smoothed loss over steps, and the validation loss where there is one."""
    # No window system and no global figure: the worker thread draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=100, layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color="#8fb8de", linewidth=0.8, label="loss")
    axes.plot(steps, [record["smoothed"] for record in records], color="#1f5fa8", linewidth=1.8, label="smoothed")
    checked = [record for record in records if "validation" in record]
    if checked:
        values = [record["validation"] for record in checked]
        axes.plot([record["step"] for record in checked], values, "o-", color="#d9792b", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend() if records else axes.set_title("no step yet")
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).float()[None] / 255


def sample_sheet(samples: list[tuple[int, list[Path]]]) -> Tensor:
    """(1, H, W, 3): a row for each time samples were made; an empty tile before the first."""
    if not samples:
        return torch.zeros(1, 64, 64, 3)
    step = max(1, (len(samples) - 1) // (ROWS - 1))
    chosen = [*samples[:-1:step][: ROWS - 1], samples[-1]]
    rows = []
    for number, files in chosen:
        each = max(1, SHEET_COLUMNS // max(1, len(files)))
        pictures = [picture for clip in sample_frames(files) for picture in spread(clip, each)]
        rows.append((f"step {number}", pictures[:SHEET_COLUMNS]))
    return contact_sheet(rows)[None]
