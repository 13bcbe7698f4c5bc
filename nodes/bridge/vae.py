"""VAE: the core's autoencoders behind ComfyUI's VAE class; its nodes and its tiling on low memory work on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...kandinsky5_core.config import VAEConfig
from ...kandinsky5_core.vae.tile_plan import activation_bytes
from ...kandinsky5_core.vae.within import decode_within
from ...kandinsky5_core.weights.load import load_vae as load_core_vae


class ComfyAutoencoder(nn.Module):
    """A core VAE that also takes pictures without a time axis, (B, C, H, W)."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor, **_: object) -> Tensor:
        """Unscaled latents, the posterior mean; (B, 3, H, W) gives (B, 16, h, w)."""
        if pixels.ndim == 4:
            return self.vae.encode(pixels.unsqueeze(2)).squeeze(2)
        return self.vae.encode(pixels)

    def decode(self, latents: Tensor, **_: object) -> Tensor:
        """Pixels in about [-1, 1]."""
        if latents.ndim == 4:
            return self.vae.decode(latents.unsqueeze(2)).squeeze(2)
        return self.vae.decode(latents)


class K5VAE(comfy.sd.VAE):
    """ComfyUI's VAE with our module inside; everything else is inherited."""

    def __init__(self, vae: nn.Module, dtype: torch.dtype) -> None:  # the parent's detects formats we do not have
        config: VAEConfig = vae.config
        video = config.kind == "hunyuan"
        ratio, group = config.spatial_ratio, config.temporal_ratio
        self.first_stage_model = ComfyAutoencoder(vae).eval()
        self.latent_channels, self.latent_dim, self.output_channels = config.latent_channels, 3 if video else 2, 3
        self.downscale_ratio = (lambda frames: max(0, math.floor((frames + group - 1) / group)), ratio, ratio)
        self.upscale_ratio = (lambda frames: max(0, frames * group - group + 1), ratio, ratio)
        self.downscale_index_formula = self.upscale_index_formula = (group, ratio, ratio)
        if not video:
            self.downscale_ratio = self.upscale_ratio = ratio
            self.downscale_index_formula = self.upscale_index_formula = None
        self.memory_used_encode = lambda shape, kind: _bytes(config, shape, kind, encode=True)
        self.memory_used_decode = lambda shape, kind: _bytes(config, shape, kind, encode=False)
        self.process_input = lambda pixels: pixels * 2.0 - 1.0
        self.process_output = lambda pixels: pixels.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.crop_input, self.not_video = True, False
        self.disable_offload = self.handles_tiling = False
        self.audio_sample_rate = 44100
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype = dtype
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.model_size()

    @property
    def config(self) -> VAEConfig:
        """What the autoencoder is."""
        return self.first_stage_model.vae.config

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """(F or B, H, W, 3) in [0, 1] to unscaled latents; frames beyond 4k+1 are left out, as ComfyUI's VAEs do."""
        if self.latent_dim == 3 and pixel_samples.ndim == 4:
            group = self.config.temporal_ratio
            pixel_samples = pixel_samples[: (len(pixel_samples) - 1) // group * group + 1]
        return super().encode(pixel_samples)

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """Unscaled latents to pixels, as ComfyUI's VAE; clips for the picture VAE and the reverse are refused."""
        check_kind(self, samples_in)
        return super().decode(samples_in, vae_options or {})

    def decode_tiled(self, samples: Tensor, **tiling: Any) -> Tensor:
        """In tiles of the given sizes, as ComfyUI's VAE."""
        check_kind(self, samples)
        return super().decode_tiled(samples, **tiling)

    def get_sd(self) -> dict[str, Tensor]:
        """Weights under the names of their file, for VAESave."""
        return self.first_stage_model.vae.state_dict()

    def decode_within(self, latents: Tensor, budget_bytes: int) -> Tensor:
        """Unscaled (B, 16, T, h, w) to frames (B, F, H, W, 3) in [0, 1], as the core does within a budget."""
        self._load(budget_bytes)
        pixels = decode_within(
            self.first_stage_model.vae,
            latents.to(self.device, self.vae_dtype),
            budget_bytes,
            on_tile=_check_cancel,
            output_device=self.output_device,
        )
        return pixels.add_(1).div_(2).clamp_(0, 1).movedim(1, -1)

    def _load(self, budget_bytes: int) -> None:
        comfy.model_management.load_models_gpu([self.patcher], memory_required=budget_bytes, force_full_load=True)


def check_kind(vae: Any, samples: Tensor) -> None:
    """That latents are of a VAE's kind.

    Raises:
        ValueError: says which VAE to load.
    """
    if vae.latent_dim == 2 and samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError("vae is for pictures and the latent is a clip; load the HunyuanVideo VAE (hunyuan_video_vae)")
    if vae.latent_dim == 3 and samples.ndim == 4:
        raise ValueError("vae is for video and the latent is a picture; load the FLUX VAE (ae)")


def _check_cancel(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _bytes(config: VAEConfig, shape: tuple[int, ...], dtype: torch.dtype, *, encode: bool) -> float:
    """Working memory of one sample, for ComfyUI to make room; `shape` is of pixels to encode, else of latents."""
    frames = shape[2] if len(shape) == 5 else 1
    height, width = shape[-2:]
    if encode:
        frames = (frames - 1) // config.temporal_ratio + 1
        height, width = height // config.spatial_ratio, width // config.spatial_ratio
    return activation_bytes(
        (1, config.latent_channels, frames, height, width),
        config,
        direction="encode" if encode else "decode",
        bytes_per_element=dtype.itemsize,
    )


def load_vae(path: Path) -> K5VAE:
    """A VAE of any layout the core reads, in the dtype ComfyUI chooses."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), [torch.bfloat16, torch.float32])
    vae, _ = load_core_vae(path, dtype=dtype)
    return K5VAE(vae, dtype)
