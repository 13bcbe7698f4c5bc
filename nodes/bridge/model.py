"""MODEL: the core's DiT inside ComfyUI's model classes, so that its samplers, patches and memory management work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...kandinsky5_core.config import Variant
from ...kandinsky5_core.sampling.schedule import shifted
from ...kandinsky5_core.weights.load import fill_module, identify_wanted
from .dit import ComfyDiT
from .latent_format import latent_format_for
from .layers import ReadyLayers
from .quantised import FORMATS, fill_quantised, stored_as

TIMESTEPS = 50_400
"""Entries of the sigma table: divisible by all usual step counts, so that `simple` gives the official schedule."""


def set_shift(sampling: torch.nn.Module, shift: float) -> None:
    """Give ComfyUI's flow sampling that shift, on a table whose levels are the official schedule's, bit by bit."""
    sampling.set_parameters(shift=shift, timesteps=TIMESTEPS, multiplier=1000)
    sampling.register_buffer("sigmas", shifted(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS, shift))


class K5ModelConfig(comfy.supported_models.Kandinsky5):
    """What ComfyUI wants to know of a model beside its weights."""

    unet_config = {"image_model": "kandinsky5", "disable_unet_model_creation": True}  # noqa: RUF012

    def __init__(self, variant: Variant, weight_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__({**self.unet_config, "model_dim": variant.dit.model_dim})
        self.sampling_settings = {"shift": variant.sampling.shift}
        self.latent_format = latent_format_for(variant)
        cast = comfy.model_management.unet_manual_cast(weight_dtype, device, self.supported_inference_dtypes)
        self.set_inference_dtype(weight_dtype, cast)


class K5Model(comfy.model_base.Kandinsky5):
    """ComfyUI's Kandinsky 5 model class around our DiT; its LoRA key names are those of that class."""

    def __init__(self, config: K5ModelConfig, dit: ComfyDiT) -> None:
        comfy.model_base.BaseModel.__init__(self, config, comfy.model_base.ModelType.FLOW)
        self.diffusion_model = dit.requires_grad_(False).eval()
        self.weights: Path | None = None
        set_shift(self.model_sampling, dit.variant.sampling.shift)

    @property
    def variant(self) -> Variant:
        """Which checkpoint this is."""
        return self.diffusion_model.variant

    def concat_cond(self, **kwargs: Any) -> None:
        """Nothing: the DiT puts its input channels together itself."""
        return

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Text, pooled text, and what an image gives, for one conditioning."""
        found = {}
        for name, key in (("c_crossattn", "cross_attn"), ("y", "pooled_output"), ("attention_mask", "attention_mask")):
            if kwargs.get(key) is not None:
                found[name] = comfy.conds.CONDRegular(kwargs[key])
        noise: Tensor = kwargs["noise"]
        source = kwargs.get("k5_source")
        if source is not None and not self.diffusion_model.config.visual_cond:
            raise ValueError(f"{self.variant.name} does not edit pictures; load an Image Editing (i2i) checkpoint")
        if source is not None:
            found["k5_source"] = comfy.conds.CONDNoiseShape(self._like(source, noise))
        clean, given = _held(kwargs, noise)
        if clean is not None and self.variant.vae.kind == "flux":
            raise ValueError(
                f"{self.variant.name} makes pictures and holds no frames; load an image to video checkpoint"
            )
        if clean is not None:
            found["k5_clean"] = comfy.conds.CONDNoiseShape(self._like(clean, noise))
            found["k5_given"] = comfy.conds.CONDNoiseShape(given.expand(-1, -1, -1, *noise.shape[-2:]))
        return found

    def _like(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Given unscaled latents in the shape of the noise, scaled.

        Raises:
            ValueError: they belong to another size.
        """
        if noise.ndim == 4 and latents.ndim == 5:
            latents = latents[:, :, 0]
        if noise.ndim == 5 and latents.ndim == 4:
            latents = latents.unsqueeze(2)
        if latents.shape[1:] != noise.shape[1:]:
            ratio = self.latent_format.spacial_downscale_ratio
            sizes = [f"{part.shape[-1] * ratio}x{part.shape[-2] * ratio}" for part in (latents, noise)]
            raise ValueError(
                f"the given image is for {sizes[0]} pixels and {tuple(latents.shape[2:-2])} latent frames, the latents "
                f"for {sizes[1]} and {tuple(noise.shape[2:-2])}; take the LATENT of the node that made the conditioning"
            )
        return self.process_latent_in(latents)


def _held(kwargs: dict[str, Any], noise: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Clean latents and their mask (1, 1, T, 1, 1), from our nodes or from ComfyUI's image to video node."""
    clean, given = kwargs.get("k5_clean"), kwargs.get("k5_given")
    start = kwargs.get("time_dim_replace")
    if clean is None and start is not None:
        count = start.shape[2]
        clean = torch.zeros((1, *noise.shape[1:]))
        clean[:, :, :count] = start[:1].to(clean)
        given = torch.zeros(1, 1, noise.shape[2], 1, 1)
        given[:, :, :count] = 1
    return clean, given


def load_model(
    path: Path, variant: Variant, weight_dtype: torch.dtype | None = None, *, named: bool = True, fast: bool = False
) -> Any:
    """A ModelPatcher with the DiT of `path`; ComfyUI decides devices, and the dtype where none is given.

    Args:
        weight_dtype: fp8 and int8 are for the blocks' linear layers, with scales; None also keeps a file's.
        named: The user chose the row; otherwise the size of the latents chooses between SD and HD.
        fast: Weights in eight bits are multiplied in eight bits.

    Raises:
        WeightsError: the file is no Kandinsky 5 DiT.
        ValueError: its sizes are not the row's, or this ComfyUI does not know the format.
    """
    found = identify_wanted(path, "dit")
    if found.info.config != variant.dit:
        raise ValueError(f"{path.name} does not have the sizes of variant {variant.name}")
    stored = weight_dtype if weight_dtype in FORMATS else stored_as(found) if weight_dtype is None else None
    device = comfy.model_management.get_torch_device()
    if weight_dtype is None or stored is not None:
        weight_dtype = comfy.model_management.unet_dtype(
            model_params=sum(record.numel for record in found.records.values()),
            supported_dtypes=K5ModelConfig.supported_inference_dtypes,
        )
    config = K5ModelConfig(variant, weight_dtype, device)

    def build(ops: Any) -> ComfyDiT:
        return ComfyDiT(variant, ops=ops, named=named)

    if stored is not None:
        dit = fill_quantised(build, found, stored=stored, dtype=weight_dtype, fast=fast)
    else:
        dit = fill_module(lambda: build(ReadyLayers), found.records, scales=found.scales, dtype=weight_dtype)
    dit.dtype = weight_dtype
    model = K5Model(config, dit)
    model.weights = path
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    comfy.model_management.archive_model_dtypes(model.diffusion_model)
    return patcher


def variant_of(model: Any) -> Variant | None:
    """Which variant a MODEL is; None where it was not loaded by this pack."""
    inner = getattr(model, "model", None)
    return inner.variant if isinstance(inner, K5Model) else None


def weights_of(model: Any) -> Path | None:
    """The file that a MODEL's weights came from, of our loader or ComfyUI's; None where it does not say."""
    inner = getattr(model, "model", None)
    if isinstance(inner, K5Model):
        return inner.weights
    made_by = getattr(model, "cached_patcher_init", None)
    first = made_by[1][0] if made_by else None
    return Path(first) if isinstance(first, (str, Path)) and Path(first).is_file() else None
