"""From the DiT to the velocity a sampler follows: input channels, classifier-free guidance, held latents."""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditioning import ImageConditioning, TextConditioning, joined
from ..config import GUIDANCE_OFF, DiTConfig
from ..dit.model import DiffusionTransformer
from ..dit.plan import VisualPlan
from .first_frame import normalise_first_frames
from .samplers import VelocityFn
from .step_cache import NEGATIVE, POSITIVE, StepCache


def model_input(latents: Tensor, image: ImageConditioning | None, config: DiTConfig) -> Tensor:
    """Latents (B, 16, T, H, W) with what the patch embedding reads beside them, (B, input_channels, T, H, W).

    Image to video puts clean latents into the noisy ones and leaves the source channels zero; editing fills the
    source channels. The mask channel says where either is given.
    """
    image = image or ImageConditioning()
    mask = torch.zeros_like(latents[:, :1]) if image.mask is None else image.mask.to(latents).expand_as(latents[:, :1])
    if image.clean is not None:
        latents = hold(latents, image)
    if not config.visual_cond:
        return latents
    source = torch.zeros_like(latents) if image.source is None else image.source.to(latents)
    return torch.cat([latents, source, mask], dim=1)


def hold(latents: Tensor, image: ImageConditioning) -> Tensor:
    """`latents` with the clean ones in place wherever the mask is 1."""
    assert image.clean is not None and image.mask is not None
    mask = image.mask.to(latents)
    return latents * (1 - mask) + image.clean.to(latents) * mask


def hold_given(latents: Tensor, image: ImageConditioning | None) -> Tensor:
    """Sampled latents with the given frames in place; where that is the first alone, normalised to the others."""
    if image is None or image.clean is None:
        return latents
    given = image.mask[:, 0, :, 0, 0].any(dim=0).nonzero().flatten().tolist()
    latents = hold(latents, image)
    return normalise_first_frames(latents) if given == [0] else latents


def guided_velocity(
    dit: DiffusionTransformer, positive: TextConditioning, negative: TextConditioning | None, guidance_scale: float,
    plan: VisualPlan, image: ImageConditioning | None = None, cache: StepCache | None = None, *, batched: bool = False,
) -> VelocityFn:  # fmt: skip
    """velocity = negative + guidance_scale * (positive - negative); at scale 1 one evaluation, without the negative.

    The sum is taken over denoised latents, x - sigma*velocity, as ComfyUI's samplers take it: the same in mathematics,
    and then in bits too, which matters since rotary embeddings are rounded to bf16 and make much of little.

    Args:
        cache: Of this run alone; may skip the DiT's visual blocks.
        batched: Both texts in one evaluation of twice the batch, the shorter one padded and masked: equal but for
            rounding, and quicker where a clip alone does not fill the device.

    Raises:
        ValueError: guidance is on and there is no negative conditioning.
    """
    guided = abs(guidance_scale - 1) > GUIDANCE_OFF
    if guided and negative is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs a negative prompt; an empty one will do")
    dtype = dit.visual_embeddings.in_layer.weight.dtype
    positive = positive.trimmed()
    negative = negative.trimmed() if guided and negative is not None else None
    both = joined([positive, negative]).trimmed() if batched and negative is not None else None

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        inputs = model_input(latents.to(dtype), image, dit.config)
        timestep = (1000 * sigma.float()).to(latents.device).expand(len(latents))

        def denoised(text: TextConditioning, *sides: int) -> tuple[Tensor, ...]:
            count = len(sides)
            around = None if cache is None else cache.around(float(sigma), sides)
            found = dit(repeated(inputs, count), repeated(timestep, count), text, plan, around).float()
            return tuple(latents - part * sigma for part in found.chunk(count))

        if negative is None:
            (guess,) = denoised(positive, POSITIVE)
        else:
            if both is not None:
                guess, unconditional = denoised(both, POSITIVE, NEGATIVE)
            else:
                (guess,), (unconditional,) = denoised(positive, POSITIVE), denoised(negative, NEGATIVE)
            guess = unconditional + (guess - unconditional) * guidance_scale
        return (latents - guess) / sigma

    return velocity


def repeated(x: Tensor, count: int) -> Tensor:
    """The batch `count` times over, one whole batch after the other."""
    return x if count == 1 else torch.cat([x] * count)
