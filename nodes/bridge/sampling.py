"""ComfyUI's samplers with a variant's settings, per-row noise and the official end of image to video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...kandinsky5_core.conditioning import ImageConditioning
from ...kandinsky5_core.config import Variant
from ...kandinsky5_core.sampling.guidance import hold_given
from ...kandinsky5_core.sampling.noise import initial_noise
from ...kandinsky5_core.sampling.schedule import flow_schedule, shifted
from ...kandinsky5_core.shapes import LatentShape
from .model import set_shift

SAMPLER_NAMES: tuple[str, ...] = tuple(comfy.samplers.KSampler.SAMPLERS)
SCHEDULES: tuple[str, ...] = tuple(comfy.samplers.KSampler.SCHEDULERS)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Everything that a run uses, after the variant filled what was left open."""

    steps: int
    guidance: float
    shift: float
    denoise: float
    seed: int
    sampler_name: str
    scheduler: str
    told: str
    """The same in words, for the user."""

    @classmethod
    def of(
        cls, variant: Variant, model: Any, *, steps: int, guidance: float, shift: float, **given: Any
    ) -> SampleSettings:
        """Zeros filled from the variant; the shift from the model, which a shift node may have changed."""
        steps = steps or variant.sampling.num_steps
        guidance = guidance or variant.sampling.guidance_scale
        shift = shift or model_shift(model)
        attention = "dense" if variant.nabla is None else f"NABLA {variant.nabla.mass:g}"
        told = (
            f"{variant.name}: {steps} steps, guidance {guidance:g}, shift {shift:g}, {given['sampler_name']}/"
            f"{given['scheduler']}, denoise {given['denoise']:g}, seed {given['seed']}, trained with {attention}"
        )
        return cls(steps=steps, guidance=guidance, shift=shift, told=told, **given)


def model_shift(model: Any) -> float:
    """The shift of a MODEL as it stands.

    Raises:
        ValueError: a patch gave it another kind of sampling.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) or sampling.multiplier != 1000:
        raise ValueError(
            f"the model was given {type(sampling).__bases__[0].__name__}; use Kandinsky 5 Shift or ModelSamplingSD3, or "
            "take the patch away"
        )
    return float(sampling.shift)


def with_shift(model: Any, shift: float) -> Any:
    """The MODEL with another shift, on the fine table that makes `simple` the official schedule."""

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    set_shift(sampling, shift)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


def schedule(variant: Variant, model: Any, steps: int, shift: float, denoise: float) -> Tensor:
    """The official sigmas, from the level of `denoise` to 0."""
    return flow_schedule(steps or variant.sampling.num_steps, shift or model_shift(model), denoise)


def rows_of_noise(shape: torch.Size, seed: int) -> Tensor:
    """Noise like a LATENT's samples; row i is that of seed + i alone, as in the core."""
    full = shape if len(shape) == 5 else (*shape[:2], 1, *shape[2:])
    noise = initial_noise(LatentShape(*full), seed)
    return noise if len(shape) == 5 else noise[:, :, 0]


def run_sampler(model: Any, positive: Any, negative: Any, latent: dict[str, Any], settings: SampleSettings) -> Any:
    """A LATENT sampled by ComfyUI, with its progress, previews and cancel.

    Raises:
        ValueError: latents of the other kind (pictures for a video model or the reverse).
    """
    if settings.shift != model_shift(model):
        model = with_shift(model, settings.shift)
    check_held(positive, negative, settings.guidance)
    if latent.get("noise_mask") is not None:
        model = with_differential_strength(model, settings.shift)
    check_latents(model, latent["samples"])
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    sigmas = None
    if settings.scheduler == "simple":
        sigmas = flow_schedule(settings.steps, settings.shift, settings.denoise)
    made = comfy.sample.sample(
        model,
        rows_of_noise(samples.shape, settings.seed),
        settings.steps,
        settings.guidance,
        settings.sampler_name,
        settings.scheduler,
        positive,
        negative,
        samples,
        denoise=settings.denoise,
        sigmas=sigmas,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, settings.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=settings.seed,
    )
    return {**latent, "samples": finished(model, made, positive)}


def check_latents(model: Any, samples: Tensor) -> None:
    """That the latents are of the model's kind.

    Raises:
        ValueError: says which nodes make the right ones.
    """
    variant: Variant = model.model.variant
    flux = variant.vae.kind == "flux"
    if flux and samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError(
            f"latent holds {samples.shape[2]} latent frames and {variant.name} makes pictures; use Kandinsky 5 Empty "
            "Latent with this model, or load a video model"
        )
    empty = int(samples.count_nonzero()) == 0
    if not flux and samples.ndim == 4 and not empty:
        raise ValueError(f"latent holds pictures and {variant.name} makes clips; encode with the HunyuanVideo VAE")
    if samples.shape[1] != variant.vae.latent_channels and not empty:
        raise ValueError(f"latent has {samples.shape[1]} channels; {variant.name} takes {variant.vae.latent_channels}")


def check_held(positive: Any, negative: Any, guidance: float) -> None:
    """That both passes of guidance hold the same frames.

    Raises:
        ValueError: only one conditioning comes from the image to video node.
    """
    held = [any("k5_given" in entry[1] for entry in conditioning) for conditioning in (positive, negative)]
    if guidance != 1 and held[0] != held[1]:
        side = "negative" if held[0] else "positive"
        raise ValueError(f"{side} does not hold the given frames; connect both outputs of the image to video node")


def with_differential_strength(model: Any, shift: float) -> Any:
    """The MODEL with grey masks as in the core: a place of strength s changes from the level where `denoise` s begins.

    ComfyUI alone would blend grey places half and half in every step.
    """

    def moves(sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
        level = shifted(denoise_mask, shift)
        now = sigma.view(-1, *[1] * (denoise_mask.ndim - 1)).to(denoise_mask)
        return ((now <= level + 1e-6) & (level > 0)).to(denoise_mask.dtype)

    patched = model.clone()
    patched.set_model_denoise_mask_function(moves)
    return patched


def finished(model: Any, samples: Tensor, positive: Any) -> Tensor:
    """Given frames exactly in place; from the first alone, its followers' statistics are pulled to the rest's."""
    held = positive[0][1]
    if "k5_given" not in held or samples.ndim != 5:
        return samples
    scale = model.get_model_object("latent_format")
    image = ImageConditioning(clean=scale.process_in(held["k5_clean"].to(samples)), mask=held["k5_given"].to(samples))
    return scale.process_out(hold_given(scale.process_in(samples), image))
