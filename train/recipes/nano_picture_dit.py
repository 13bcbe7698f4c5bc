"""The Nano DiTs of pictures: `nano-image` makes them from text, `nano-edit` also changes a given one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.conditioning import ImageConditioning, TextConditioning, joined
from kandinsky5_core.config import NANO_IMAGE_SIZES, VARIANTS
from kandinsky5_core.dit.model import DiffusionTransformer, initialise
from kandinsky5_core.nano.drawing import random_clip, random_pair
from kandinsky5_core.nano.edits import varied_instruction
from kandinsky5_core.nano.language import varied_caption
from kandinsky5_core.text.encoder import TextEncoder

from ..checkpoint import write_tensors
from ..config import FitConfig
from ..loop import fit
from ..objectives.flow_matching import Batch, FlowMatching
from .nano_dit import CAPTION_DROP
from .nano_latents import LinearCode

SEED = 60
SQUARE_SHARE = 0.55
"""Of the batches that are of the first size; the others share the rest."""
NUM_PICTURES, NUM_EDITS = 6000, 6000
"""Drawn for the first size; a third of that for each of the others."""
EDIT_SHARE = 0.65
BATCH_SIZE = 48
IMAGE = FitConfig(
    num_steps=4500, learning_rate=2e-3, optimizer="muon", warmup_steps=100, ema_decay=0.998, checkpoint_every=250,
    seed=SEED,
)  # fmt: skip
LONGER = replace(IMAGE, num_steps=8000, seed=SEED + 5)
"""A second stage of `nano-image` from the first one's average, on more pictures: outlines are learned last."""
FINER = replace(IMAGE, num_steps=5000, learning_rate=1.2e-3, seed=SEED + 6)
"""A third, slower one."""
MORE_PICTURES = 16_000
EDIT = FitConfig(
    num_steps=6000, learning_rate=2e-3, optimizer="muon", warmup_steps=100, ema_decay=0.998, checkpoint_every=250,
    seed=SEED + 1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PicturePool:
    """Pictures of one size; row i of everything belongs together."""

    latents: Tensor
    """(N, 16, 1, H, W)."""
    text: TextConditioning
    """N rows; about a tenth is the empty prompt."""
    source: Tensor | None = None
    """(N, 16, 1, H, W), the pictures before the edit."""


def _said(text: str, rng: random.Random) -> str:
    return "" if rng.random() < CAPTION_DROP else text


@torch.no_grad()
def drawn_pictures(
    encoder: TextEncoder, code: LinearCode, rng: random.Random, size: tuple[int, int], count: int
) -> PicturePool:
    """Pictures with captions."""
    latents, texts = [], []
    for _ in range(count):
        scene, frames = random_clip(rng, 1, size)
        latents.append(code.encode(frames[None])[0])
        texts.append(_said(varied_caption(scene, rng, moving=False), rng))
    parts = [encoder.encode(texts[i : i + 256], task="t2i", max_tokens=40).trimmed() for i in range(0, count, 256)]
    return PicturePool(latents=torch.stack(latents), text=joined(parts))


@torch.no_grad()
def drawn_edits(
    encoder: TextEncoder, code: LinearCode, rng: random.Random, size: tuple[int, int], count: int
) -> PicturePool:
    """Pictures before and after an edit, with the instruction read beside the picture, as inference does."""
    latents, sources, texts = [], [], []
    for _ in range(count):
        _, edit, before, after = random_pair(rng, size)
        sources.append(code.encode(before[None, None])[0])
        latents.append(code.encode(after[None, None])[0])
        text = _said(varied_instruction(edit, rng), rng)
        texts.append(encoder.encode([text], task="i2i", max_tokens=40, images=[before]))
    return PicturePool(latents=torch.stack(latents), text=joined(texts), source=torch.stack(sources))


@dataclass
class PictureBatches:
    """Batches of one size and one kind: from text, or edits."""

    pictures: list[PicturePool]
    edits: list[PicturePool]
    """Empty: text to image alone."""

    def __call__(self, step: int, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """The batch of one step."""
        kind, square = torch.rand(2, generator=generator).tolist()
        pools = self.edits if self.edits and kind < EDIT_SHARE else self.pictures
        other = int(torch.randint(1, len(pools), (), generator=generator))
        pool = pools[0 if square < SQUARE_SHARE else other]
        rows = torch.randint(len(pool.latents), (BATCH_SIZE,), generator=generator)
        image = None
        if pool.source is not None:
            image = ImageConditioning(source=pool.source[rows], mask=torch.ones(BATCH_SIZE, 1, 1, 1, 1))
        return Batch(latents=pool.latents[rows], text=pool.text.rows(rows), image=image)


def train_picture_dit(folder: Path, shared: Path, encoder: TextEncoder, name: str) -> Path:
    """Train 'nano-image' or 'nano-edit' in `folder`; `shared` holds the code. The path of the finished weights."""
    variant = VARIANTS[name]
    editing = "i2i" in variant.tasks
    code = LinearCode.load(shared / "code.safetensors")
    rng = random.Random(SEED + 2 + editing)
    counts = [1.0] + [1 / 3] * (len(NANO_IMAGE_SIZES) - 1)
    sizes = list(zip(NANO_IMAGE_SIZES, counts, strict=True))
    draw = partial(drawn_pictures, encoder, code, rng)
    pictures = [draw(size, int(NUM_PICTURES * share)) for size, share in sizes]
    edits = [drawn_edits(encoder, code, rng, size, int(NUM_EDITS * share)) for size, share in sizes if editing]
    model = DiffusionTransformer(variant.dit)
    initialise(model, torch.Generator().manual_seed(SEED + editing))
    objective = FlowMatching(PictureBatches(pictures, edits), variant.rope_scale, shift=variant.sampling.shift)
    average = fit(model, objective, EDIT if editing else IMAGE, folder / "dit-run")
    model.load_state_dict(average.state_dict())
    if not editing:
        more = [draw(size, int(MORE_PICTURES * share)) for size, share in sizes]
        objective = replace(objective, batches=PictureBatches(more, []))
        for config, stage in ((LONGER, "dit-longer"), (FINER, "dit-finer")):
            average = fit(model, objective, config, folder / stage)
            model.load_state_dict(average.state_dict())
    result = folder / "dit.safetensors"
    write_tensors(result, average.state_dict())
    return result
