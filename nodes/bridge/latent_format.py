"""How LATENT relates to what the DiT sees, and to a quick preview.

LATENT holds unscaled VAE latents. Kandinsky 5 multiplies by the VAE's factor and shifts nothing, with the FLUX VAE
too, where ComfyUI's own format would shift.
"""

from __future__ import annotations

import comfy.latent_formats

from ...kandinsky5_core.config import VAEConfig, Variant
from .previews import NANO_IMAGE, NANO_VIDEO


def latent_format_for(variant: Variant) -> comfy.latent_formats.LatentFormat:
    """The format of a variant's LATENT."""
    video = variant.vae.kind == "hunyuan"
    released = comfy.latent_formats.HunyuanVideo() if video else comfy.latent_formats.Flux()
    made = comfy.latent_formats.LatentFormat()
    made.latent_channels = variant.vae.latent_channels
    made.latent_dimensions = 3 if video else 2
    made.spacial_downscale_ratio = variant.vae.spatial_ratio
    made.temporal_downscale_ratio = variant.vae.temporal_ratio
    made.scale_factor = variant.vae.scaling_factor
    if variant.family.startswith("Nano"):
        made.latent_rgb_factors, made.latent_rgb_factors_bias = NANO_VIDEO if video else NANO_IMAGE
    else:
        made.latent_rgb_factors = released.latent_rgb_factors
        made.latent_rgb_factors_bias = released.latent_rgb_factors_bias
        made.taesd_decoder_name = released.taesd_decoder_name
    return made


def matches(vae: VAEConfig, variant: Variant) -> bool:
    """Whether the VAE's latents are those of the variant."""
    return vae.kind == variant.vae.kind
