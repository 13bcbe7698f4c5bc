"""Flow matching: predict the velocity noise - clean at a random noise level (report section 4.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kandinsky5_core.conditioning import ImageConditioning, TextConditioning
from kandinsky5_core.config import NablaConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.sampling.guidance import model_input
from kandinsky5_core.shapes import LatentShape


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean training samples of one size."""

    latents: Tensor
    """(B, C, T, H, W), scaled for the DiT."""
    text: TextConditioning
    image: ImageConditioning | None = None
    """Latents that are given: `clean` ones stand in the noisy channels wherever the mask is 1 and are out of the loss
    (image to video), `source` ones stand in the source channels (editing)."""


def hold_first(latents: Tensor, chosen: Tensor) -> ImageConditioning:
    """Image to video for the chosen rows, (B,) bool: the first latent frame is given."""
    mask = torch.zeros(len(latents), 1, latents.shape[2], 1, 1)
    mask[:, :, 0] = chosen.view(-1, 1, 1, 1).float()
    return ImageConditioning(clean=latents, mask=mask)


def sample_sigmas(count: int, distribution: str, shift: float, generator: torch.Generator) -> Tensor:
    """(count,) noise levels in (0, 1).

    'uniform' and 'logit_normal' draw s; `shift` then warps it as the sampling schedule does, shift*s/(1+(shift-1)*s),
    so that 'uniform' with the variant's shift trains on just the levels that sampling visits.

    Raises:
        ValueError: unknown distribution.
    """
    if distribution == "uniform":
        sigmas = torch.rand(count, generator=generator)
    elif distribution == "logit_normal":
        sigmas = torch.randn(count, generator=generator).sigmoid()
    else:
        raise ValueError(f"unknown sigma distribution '{distribution}'; use 'uniform' or 'logit_normal'")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@dataclass
class FlowMatching:
    """The objective for `train.loop.fit`: mean squared error on the velocity, over every frame that is not given.

    In image to video the clean first frame stands in the noisy channels, its mask is 1 and the source channels
    are zero, exactly as in inference.
    """

    batches: Callable[[int, torch.Generator], Batch]
    """Batch number `index`, a function of (index, generator) alone."""
    rope_scale: tuple[float, float, float]
    distribution: str = "uniform"
    shift: float = 3.0
    nabla: NablaConfig | None = None

    def __call__(self, model: DiffusionTransformer, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """{'loss': scalar} of batch number `index`."""
        batch = self.batches(index, generator)
        sigmas = sample_sigmas(len(batch.latents), self.distribution, self.shift, generator)
        # Drawn on the CPU: the same on every device.
        noise = torch.randn(batch.latents.shape, generator=generator)
        return {"loss": self.at(model, batch, sigmas, noise)}

    def at(self, model: DiffusionTransformer, batch: Batch, sigmas: Tensor, noise: Tensor) -> Tensor:
        """The loss of a batch at given noise levels (B,) and noise like the latents."""
        velocity = self.velocity(model, batch, sigmas, noise)
        return mean_error(velocity, (noise - batch.latents.float()).to(velocity.device), batch.image)

    def velocity(self, model: DiffusionTransformer, batch: Batch, sigmas: Tensor, noise: Tensor) -> Tensor:
        """(B, C, T, H, W) fp32 that the model predicts for a batch at given noise levels and noise."""
        config, weight = dit_of(model).config, dit_of(model).visual_embeddings.in_layer.weight
        device, dtype = weight.device, weight.dtype
        clean, noise, sigmas = batch.latents.to(device).float(), noise.to(device), sigmas.to(device)
        level = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        inputs = model_input(noisy.to(dtype), batch.image, config)
        grid = LatentShape(*clean.shape).token_grid(config.patch_size)
        plan = plan_visual(config, grid, self.rope_scale, self.nabla, device)
        return model(inputs, 1000 * sigmas, batch.text.trimmed().to(device, dtype), plan).float()


def mean_error(velocity: Tensor, target: Tensor, image: ImageConditioning | None) -> Tensor:
    """Mean squared error over every frame that is not given."""
    error = (velocity - target).square().mean(dim=1, keepdim=True)
    counted = _not_given(image, error)
    return (error * counted).sum() / counted.sum().clamp_min(1)


def _not_given(image: ImageConditioning | None, error: Tensor) -> Tensor:
    """1 where the model has to predict, like `error` (B, 1, T, H, W)."""
    if image is None or image.clean is None:
        return torch.ones_like(error)
    return (1 - image.mask.to(error)).expand_as(error)


def dit_of(model: nn.Module) -> DiffusionTransformer:
    """The network inside the wrappers of accelerate and of a LoRA."""
    model = getattr(model, "module", model)
    return getattr(model, "base", model)
