"""diffusers' classes with our weights, to run beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..conditioning import TextConditioning
from ..config import DiTConfig
from ..dit.model import DiffusionTransformer
from ..vae.flux import FluxVAE
from ..vae.hunyuan.model import HunyuanVAE
from ..weights.modules import build_on_meta
from .timing import timed

RIVALS = ("diffusers",)
NATIVE = "native"
EXACT = (NATIVE, "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")
BACKENDS = (*EXACT, "sage")
"""Of `set_attention_backend`, in diffusers 0.42; the last rounds queries and keys to eight bits: timed, never taken."""
BACKEND_ERROR = 0.05
"""How far a backend's output may be from PyTorch's, in 16 bits."""
PROBED_BLOCKS, PROBES = 2, 2
FP32_PARTS = ("time_embeddings", "modulation")
"""What diffusers keeps in fp32 when it loads its DiT in 16 bits."""


def check_rival(name: str) -> None:
    """Refuse what cannot be run beside ours.

    Raises:
        ValueError: it is unknown or not installed.
    """
    if name not in RIVALS:
        raise ValueError(f"--against '{name}' is unknown; use {', '.join(RIVALS)}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--against {name} needs the package {name}; install it (pip install {name}) or leave it out")


def diffusers_dit(ours: DiffusionTransformer) -> nn.Module:
    """diffusers' DiT over the very tensors of ours, but for those that it keeps in fp32."""
    from diffusers import Kandinsky5Transformer3DModel

    config = ours.config
    sizes = {entry.name: getattr(config, entry.name) for entry in fields(DiTConfig)}
    theirs = build_on_meta(lambda: Kandinsky5Transformer3DModel(**sizes))
    state = {
        name: tensor.float() if any(part in name for part in FP32_PARTS) else tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.to(next(iter(state.values())).device).eval().requires_grad_(False)


def diffusers_step(
    theirs: nn.Module, latents: Tensor, timestep: Tensor, text: TextConditioning, grid: tuple[int, int, int],
    rope_scale: tuple[float, float, float],
) -> Callable[[], Tensor]:  # fmt: skip
    """One evaluation as diffusers' pipeline calls it; gives (B, C, T, H, W)."""
    device = latents.device
    hidden = latents.permute(0, 2, 3, 4, 1).contiguous()
    positions = [torch.arange(size, device=device) for size in grid]
    text_positions = torch.arange(text.embeds.shape[1], device=device)

    def step() -> Tensor:
        found = theirs(
            hidden_states=hidden, encoder_hidden_states=text.embeds, timestep=timestep,
            pooled_projections=text.pooled, visual_rope_pos=positions, text_rope_pos=text_positions,
            scale_factor=rope_scale, return_dict=False,
        )  # fmt: skip
        return (found if torch.is_tensor(found) else found[0]).permute(0, 4, 1, 2, 3)

    return step


class Contenders:
    """diffusers' DiT over our tensors with its best attention backend, as it is and, if asked for, compiled too."""

    def __init__(self, ours: DiffusionTransformer, *, compiled: bool) -> None:
        self.plain = diffusers_dit(ours)
        self.compiled = diffusers_dit(ours) if compiled else None
        if self.compiled is not None:
            self.compiled.compile_repeated_blocks()

    def steps(
        self, latents: Tensor, timestep: Tensor, text: TextConditioning, grid: tuple[int, int, int],
        rope_scale: tuple[float, float, float],
    ) -> tuple[dict[str, Callable[[], Tensor]], dict[str, object]]:  # fmt: skip
        """Evaluations by name, which says the backend; and what every backend took, or why it cannot be used."""
        given = (latents, timestep, text, grid, rope_scale)
        best, told = best_backend(self.plain, diffusers_step(self.plain, *given), latents.device)
        steps = {f"diffusers ({best})": diffusers_step(self.plain, *given)}
        if self.compiled is not None:
            self.compiled.set_attention_backend(best)
            steps[f"diffusers ({best}, compiled)"] = diffusers_step(self.compiled, *given)
        return steps, told


@torch.inference_mode()
def best_backend(theirs: nn.Module, step: Callable[[], Tensor], device: torch.device) -> tuple[str, dict[str, object]]:
    """The fastest attention backend of diffusers that is exact, by a short run of two blocks each; it is left set.

    Those from its hub are no part: they would be downloaded.

    Returns:
        Its name, and by name the seconds or the problem of each; on a CPU only 'native', which needs no comparison.
    """
    if device.type != "cuda":
        theirs.set_attention_backend(NATIVE)
        return NATIVE, {NATIVE: "the only one on this device"}
    blocks = theirs.visual_transformer_blocks
    theirs.visual_transformer_blocks = blocks[:PROBED_BLOCKS]
    seconds: dict[str, float] = {}
    told: dict[str, object] = {}
    expected = None
    try:
        for name in BACKENDS:
            try:
                theirs.set_attention_backend(name)
                found = step()
                expected = found if expected is None else expected
                error = float((found.float() - expected.float()).norm() / expected.float().norm())
                took = min(timed(step, device)[0] for _ in range(PROBES))
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # Packages that are missing or broken fail with every kind of exception.
                told[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or ['no message'])[0]}"
                continue
            told[name] = round(took, 5)
            if not error < BACKEND_ERROR:
                told[name] = f"{took:.5f} s, but differs by {error:.2g}"
            elif name in EXACT:
                seconds[name] = took
    finally:
        theirs.visual_transformer_blocks = blocks
        best = min(seconds, key=seconds.__getitem__, default=NATIVE)
        theirs.set_attention_backend(best)
    return best, told


def diffusers_vae(ours: HunyuanVAE | FluxVAE) -> nn.Module:
    """diffusers' VAE with the same weights, its own tiling switched on."""
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo

    config, width = ours.config, ours.config.block_out_channels
    if config.kind == "hunyuan":
        theirs = AutoencoderKLHunyuanVideo(
            block_out_channels=width, layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        )  # fmt: skip
    else:
        theirs = AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=width, layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups, sample_size=1024,
            down_block_types=("DownEncoderBlock2D",) * len(width), up_block_types=("UpDecoderBlock2D",) * len(width),
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    parameter = next(ours.parameters())
    theirs.to(parameter.device, parameter.dtype).eval().requires_grad_(False)
    theirs.enable_tiling()
    return theirs
