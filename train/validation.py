"""Looking at the model while it trains: samples at fixed prompts and seeds, and a loss at fixed noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.inputs import Inputs, encode_inputs
from kandinsky5_core.media import read_image, write_image, write_video
from kandinsky5_core.pipeline import Models, decode_frames, encode_prompts, sample_latents
from kandinsky5_core.request import Request, resolve
from kandinsky5_core.shapes import LatentShape, VideoShape

from .config import SampleConfig, ValidationConfig
from .jobs import SAMPLES, write_json
from .objectives.flow_matching import Batch, FlowMatching, dit_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

LOSS_BATCHES = 8
"""Batches of the validation loss, at as many noise levels each."""
LOSS_SEED = 20_011


class Interrupted(Exception):  # noqa: N818 - not an error
    """A stop was wished while sampling."""


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """One sample with its text and pictures encoded, so that no text encoder needs to stay."""

    request: Request
    shape: LatentShape
    positive: TextConditioning
    negative: TextConditioning | None
    inputs: Inputs


def sample_request(sample: SampleConfig, config: ValidationConfig, models: Models) -> Request:
    """The request of a sample, checked.

    Raises:
        ValueError: it does not fit the variant.
    """
    image = read_image(sample.image) if sample.image else None
    task = next((task for task in ("t2v", "t2i") if task in models.variant.tasks), models.variant.tasks[0])
    if image is not None:
        tasks = [task for task in ("i2v", "i2i") if task in models.variant.tasks]
        if not tasks:
            raise ValueError(f"{models.variant.name} takes no image: leave out validation image {sample.image}")
        task = tasks[0]
    request = Request(
        prompt=sample.prompt, task=task, image=image, seed=sample.seed, num_steps=config.num_steps or None,
        height=config.height or None, width=config.width or None, num_frames=config.num_frames or None,
    )  # fmt: skip
    return resolve(request, models.variant)


@torch.no_grad()
def prepare(request: Request, models: Models) -> PreparedSample:
    """Encode what a request gives."""
    shape = VideoShape(request.batch, request.num_frames, request.height, request.width)
    latent_shape = shape.latent_shape(models.variant.vae)
    with models.on_device(models.text_encoder):
        positive, negative = encode_prompts(models, request)
    with models.on_device(models.vae):
        inputs = encode_inputs(models, request, latent_shape) if request.given is not None else Inputs()
    return PreparedSample(request=request, shape=latent_shape, positive=positive, negative=negative, inputs=inputs)


@dataclass
class Validation:
    """Samples and the loss at fixed noise, of the model at a step."""

    models: Models
    """`dit` is the network that trains; the text encoders may be gone."""
    samples: list[PreparedSample]
    objective: FlowMatching
    batches: Callable[[int, torch.Generator], Batch]
    """Held out, or the training's own."""
    folder: Path
    """The job's."""
    check: Callable[[str], None] = field(default=lambda _: None)
    """Called between sampling steps with what is done; raises `Interrupted` to end early."""

    @torch.no_grad()
    def run(self, step: int, model: nn.Module, board: SummaryWriter | None = None) -> float | None:
        """Write the samples below samples/ and return the loss; None when interrupted."""
        try:
            value = self.loss(model)
            self.write_samples(step, model, board)
        except Interrupted:
            return None
        return value

    def loss(self, model: nn.Module) -> float:
        """Mean over fixed batches, each at noise levels spread evenly over what is trained on."""
        total = 0.0
        for number in range(LOSS_BATCHES):
            self.check(f"validation loss, batch {number + 1} of {LOSS_BATCHES}")
            generator = torch.Generator().manual_seed(LOSS_SEED + number)
            batch = self.batches(number, generator)
            level = torch.full((len(batch.latents),), (number + 0.5) / LOSS_BATCHES)
            shift = self.objective.shift
            sigmas = shift * level / (1 + (shift - 1) * level)
            noise = torch.randn(batch.latents.shape, generator=generator)
            total += float(self.objective.at(model, batch, sigmas, noise)) / LOSS_BATCHES
        return total

    def write_samples(self, step: int, model: nn.Module, board: SummaryWriter | None) -> None:
        """One file a sample; a folder that has its name is whole."""
        if not self.samples:
            return
        target = self.folder / SAMPLES / f"step-{step:08d}"
        aside = target.with_name(f"{target.name}.partial")
        aside.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(self.samples):
            frames = self.make(sample, model, number)
            stem = aside / f"{number:02d}"
            told = {"prompt": sample.request.prompt, "seed": str(sample.request.seed), "step": str(step)}
            if len(frames) == 1:
                write_image(stem.with_suffix(".png"), frames[0], told)
            else:
                write_video(stem.with_suffix(".mp4"), frames, self.models.variant.fps, told)
            if board is not None:
                name = f"sample {number}: {sample.request.prompt[:60]}"
                board.add_image(name, _still(frames), step, dataformats="HWC")
        write_json(aside / "samples.json", {"step": step, "prompts": [s.request.prompt for s in self.samples]})
        if target.exists():  # made before the run was interrupted, and the same
            for file in aside.iterdir():
                file.replace(target / file.name)
            aside.rmdir()
        else:
            aside.replace(target)

    def make(self, sample: PreparedSample, model: nn.Module, number: int) -> Tensor:
        """Frames (F, H, W, 3) in [0, 1]."""
        models = replace(self.models, dit=dit_of(model))

        def on_step(done: int, num_steps: int, latents: Tensor) -> None:  # noqa: ARG001
            self.check(f"sample {number + 1} of {len(self.samples)}, step {done} of {num_steps}")

        latents = sample_latents(
            models, sample.request, sample.shape, sample.positive, sample.negative, sample.inputs, on_step
        )
        with models.on_device(models.vae):
            return sample.inputs.finish(decode_frames(models, latents, sample.request.vae_budget_bytes))[0]


def _still(frames: Tensor) -> Tensor:
    """First, middle and last frame side by side, (H, W, 3)."""
    chosen = {0, len(frames) // 2, len(frames) - 1}
    return torch.cat([frames[index] for index in sorted(chosen)], dim=1)
