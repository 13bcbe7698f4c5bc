"""Clips that take more than one run: loops, and clips that go on from their last frames.

Both use what image to video offers, clean latent frames with a mask, beyond the single first frame that the
released models were trained with (docs/images-and-editing.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .canvas import cover
from .request import Request
from .sampling.noise import MAX_SEED

CHUNK_STRIDE = 1_000_003
"""Between the seeds of a clip's chunks: the same for a row of a batch as for that row alone."""

Make = Callable[[Request], Tensor]
"""Runs one resolved request; its frames (B, F, H, W, 3)."""


def looped(request: Request, group: int, make: Make) -> Tensor:
    """A clip that ends where it began, (B, F - group, H, W, 3); its repeated last frames are dropped.

    Args:
        request: Resolved. Without a first frame it is made first, as a picture of the same prompt.
        group: Frames that share a latent frame.
    """
    rows = []
    for row in rows_of(request):
        first = row.image if row.image is not None else row.keyframes.get(0)
        if first is None:
            first = make(replace(row, task="t2i", loop=False, num_frames=1, keyframes={}))[0, 0]
        last = request.num_frames - 1
        keyframes = {**row.keyframes, 0: first, last: first}
        rows.append(make(replace(row, task="i2v", loop=False, image=None, keyframes=keyframes))[:, :-group])
    return torch.cat(rows)


def extended(request: Request, make: Make) -> Tensor:
    """The given clip going on for `chunks` runs, (B, F', H, W, 3); each run sees the last `overlap` frames."""
    rows = []
    for row in rows_of(request):
        clip = cover(tuple(row.extend.shape[1:3]), (row.height, row.width)).to_work(row.extend.float())
        for chunk in range(request.chunks):
            seed = (row.seed + chunk * CHUNK_STRIDE) % MAX_SEED
            piece = make(replace(row, extend=clip[-row.overlap :], chunks=1, seed=seed))[0]
            clip = join(clip, piece, row.overlap)
        rows.append(clip)
    return torch.stack(rows)


def rows_of(request: Request) -> list[Request]:
    """One request for each row of the batch, with consecutive seeds."""
    return [replace(request, batch=1, seed=request.seed + row) for row in range(request.batch)]


def join(clip: Tensor, piece: Tensor, overlap: int) -> Tensor:
    """`clip` (F, H, W, 3) and a `piece` that begins with its last `overlap` frames, faded from one into the other.

    The piece's first frames have been through the VAE; fading spreads that small difference over the overlap.
    """
    fade = torch.linspace(0, 1, overlap + 2)[1:-1].view(-1, 1, 1, 1)
    both = clip[-overlap:] * (1 - fade) + piece[:overlap] * fade
    return torch.cat([clip[:-overlap], both, piece[overlap:]])
