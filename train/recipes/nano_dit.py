"""The Nano video DiT: stills first, then clips (t2v and i2v) with some stills, as the report's stages go.

A last stage, which the released models did not have, teaches it frames given at any place: keyframes, and the
beginning of a clip that goes on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.conditioning import ImageConditioning, TextConditioning, joined
from kandinsky5_core.config import VARIANTS
from kandinsky5_core.dit.model import DiffusionTransformer, initialise
from kandinsky5_core.nano.drawing import random_clip
from kandinsky5_core.nano.language import varied_caption
from kandinsky5_core.text.encoder import TextEncoder

from ..checkpoint import write_tensors
from ..config import FitConfig
from ..loop import fit
from ..objectives.flow_matching import Batch, FlowMatching, hold_first
from .nano_latents import LinearCode

SEED = 40
NUM_CLIPS, NUM_STILLS = 10_000, 3_000
CAPTION_DROP = 0.1
I2V_SHARE = 0.3
STILLS = FitConfig(
    num_steps=800, learning_rate=2e-3, optimizer="muon", warmup_steps=100, schedule="constant", ema_decay=0.995,
    checkpoint_every=250, seed=SEED,
)  # fmt: skip
CLIPS = FitConfig(
    num_steps=7000, learning_rate=2e-3, optimizer="muon", warmup_steps=100, ema_decay=0.998, checkpoint_every=250,
    seed=SEED + 1,
)  # fmt: skip
KEYFRAMES = FitConfig(
    num_steps=3000, learning_rate=1e-3, optimizer="muon", warmup_steps=100, ema_decay=0.998, checkpoint_every=250,
    seed=SEED + 3,
)  # fmt: skip
GIVEN_SHARES = {"none": 0.3, "first": 0.25, "first_and_last": 0.15, "last": 0.08, "some": 0.1, "beginning": 0.12}
"""Of the last stage's clips."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Latents and captions of drawn clips; row i of everything belongs together."""

    latents: Tensor
    """(N, 16, T, H, W)."""
    keyframes: Tensor
    """(N, 16, T, H, W): each latent frame made of one of its four frames, standing still, as inference makes them."""
    moving: TextConditioning
    """Captions that tell the motion; N rows and a last one, the empty prompt."""
    still: TextConditioning
    """Captions without a verb for the first rows, encoded as the text of images is."""


def _encode(encoder: TextEncoder, texts: list[str], task: str) -> TextConditioning:
    """Every text and the empty prompt, trimmed to the longest."""
    parts = []
    for start in range(0, len(texts) + 1, 256):
        part = encoder.encode([*texts, ""][start : start + 256], task=task, max_tokens=40)
        parts.append(part)
    return joined(parts).trimmed()


@torch.no_grad()
def make_pool(encoder: TextEncoder, code: LinearCode, seed: int, count: int) -> Pool:
    """Draw and encode `count` clips."""
    variant = VARIANTS["nano-video"]
    rng = random.Random(seed)
    latents, keyframes, moving, still = [], [], [], []
    for _ in range(count):
        scene, frames = random_clip(rng, variant.num_frames, variant.resolutions[0])
        latents.append(code.encode(frames[None])[0])
        keyframes.append(code.encode(_halting(frames, rng)[None])[0])
        moving.append(varied_caption(scene, rng))
        still.append(varied_caption(scene, rng, moving=False))
    return Pool(
        latents=torch.stack(latents),
        keyframes=torch.stack(keyframes),
        moving=_encode(encoder, moving, "t2v"),
        still=_encode(encoder, still[:NUM_STILLS], "t2i"),
    )


def _halting(frames: Tensor, rng: random.Random) -> Tensor:
    """The clip with each group of four frames replaced by one of them."""
    picks = [1 + 4 * group + rng.randrange(4) for group in range((len(frames) - 1) // 4)]
    return torch.cat([frames[:1], frames[picks].repeat_interleave(4, 0)])


def keyframed(latents: Tensor, keyframes: Tensor, generator: torch.Generator) -> ImageConditioning:
    """A random choice of given frames for every row, by `GIVEN_SHARES`."""
    mask = torch.zeros(len(latents), 1, latents.shape[2], 1, 1)
    clean = latents.clone()
    kinds = torch.multinomial(torch.tensor(list(GIVEN_SHARES.values())), len(latents), True, generator=generator)
    for row, kind in enumerate(kinds.tolist()):
        name = list(GIVEN_SHARES)[kind]
        given = _given(name, latents.shape[2], generator)
        mask[row, 0, given] = 1
        if name != "beginning":
            clean[row, :, given] = keyframes[row, :, given]
    return ImageConditioning(clean=clean, mask=mask)


def _given(kind: str, num_frames: int, generator: torch.Generator) -> list[int]:
    """Latent frames that are given."""
    if kind == "some":
        return torch.randperm(num_frames, generator=generator)[: 1 + num_frames // 2].tolist()
    if kind == "beginning":
        return list(range(2 + int(torch.randint(num_frames - 3, (), generator=generator))))
    return {"none": [], "first": [0], "first_and_last": [0, num_frames - 1], "last": [num_frames - 1]}[kind]


@dataclass
class NanoBatches:
    """Batches out of the pool: all stills or all clips, never mixed."""

    pool: Pool
    still_share: float
    num_stills: int = 64
    num_clips: int = 24
    keyframes: bool = False
    """Frames are given at any place, not only the first."""

    def __call__(self, step: int, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """The batch of one step."""
        stills = bool(torch.rand((), generator=generator) < self.still_share)
        count = self.num_stills if stills else self.num_clips
        captions = self.pool.still if stills else self.pool.moving
        empty = len(captions.embeds) - 1
        rows = torch.randint(empty, (count,), generator=generator)
        text_rows = torch.where(torch.rand(count, generator=generator) < CAPTION_DROP, empty, rows)
        latents = self.pool.latents[rows]
        return Batch(
            latents=latents[:, :, :1] if stills else latents,
            text=captions.rows(text_rows),
            image=None if stills else self._given(latents, rows, generator),
        )

    def _given(self, latents: Tensor, rows: Tensor, generator: torch.Generator) -> ImageConditioning:
        if self.keyframes:
            return keyframed(latents, self.pool.keyframes[rows], generator)
        return hold_first(latents, torch.rand(len(rows), generator=generator) < I2V_SHARE)


def train_dit(folder: Path, encoder: TextEncoder) -> Path:
    """Train in `folder`, which holds the code already; the path of the finished weights."""
    variant = VARIANTS["nano-video"]
    code = LinearCode.load(folder / "code.safetensors")
    pool = make_pool(encoder, code, SEED + 2, NUM_CLIPS)
    model = DiffusionTransformer(variant.dit)
    initialise(model, torch.Generator().manual_seed(SEED))
    objective = FlowMatching(NanoBatches(pool, 1.0), variant.rope_scale, shift=variant.sampling.shift)
    fit(model, objective, STILLS, folder / "dit-stills")
    average = fit(model, replace(objective, batches=NanoBatches(pool, 0.1)), CLIPS, folder / "dit-clips")
    model.load_state_dict(average.state_dict())
    batches = NanoBatches(pool, 0.1, keyframes=True)
    average = fit(model, replace(objective, batches=batches), KEYFRAMES, folder / "dit-keyframes")
    result = folder / "dit.safetensors"
    write_tensors(result, average.state_dict())
    return result
