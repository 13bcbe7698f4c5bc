"""The Nano VAEs, of clips and of pictures: small pieces first, whole ones last."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5_core.config import NANO_IMAGE_SIZES, NANO_IMAGE_VAE, VARIANTS
from kandinsky5_core.nano.drawing import random_clip
from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.layers import CausalConv3d
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE

from ..checkpoint import write_tensors
from ..config import FitConfig
from ..loop import fit
from ..objectives.reconstruction import CodeReconstruction
from .nano_latents import LinearCode, fit_linear_code, fit_picture_code

SEED = 20
PIECES = FitConfig(num_steps=4500, learning_rate=2e-3, warmup_steps=100, final_rate=0.1, ema_decay=0.998,
                   checkpoint_every=250, seed=SEED, bf16=True)  # fmt: skip
WHOLE = FitConfig(num_steps=500, learning_rate=3e-4, warmup_steps=50, ema_decay=0.998, checkpoint_every=100,
                  seed=SEED + 1)  # fmt: skip


PICTURE_PIECES = replace(PIECES, num_steps=3000, seed=SEED + 5)
PICTURE_WHOLE = replace(WHOLE, num_steps=600, seed=SEED + 6)


def drawn_clips(seed: int, count: int, num_frames: int, side: int) -> Tensor:
    """A pool of random clips, (count, F, side, side, 3) uint8."""
    rng = random.Random(seed)
    return torch.stack([(random_clip(rng, num_frames, (side, side))[1] * 255).round().byte() for _ in range(count)])


@torch.no_grad()
def initialise(vae: HunyuanVAE | FluxVAE) -> None:
    """Start near the identity, and with group norms that keep absolute levels.

    A group norm divides by the spread of what it sees, so colour, which is a level, is what a small VAE learns
    last. Two channels of each group carry +2 and -2 from the start: they dominate the spread, and the norm of
    the others becomes nearly a fixed scale. The second convolution of every resnet starts small.
    """
    groups = vae.config.norm_num_groups
    for name, module in vae.named_modules():
        if not isinstance(module, (CausalConv3d, nn.Conv2d)):
            continue
        conv: nn.Conv3d | nn.Conv2d = module.conv if isinstance(module, CausalConv3d) else module
        if name.endswith("conv2"):
            conv.weight.mul_(0.2)
        elif not name.endswith("conv1") and conv.out_channels % groups == 0 and not name.endswith("conv_out"):
            bias = conv.bias.zero_().view(groups, -1)
            bias[:, 0], bias[:, 1] = 2.0, -2.0


def train_vae(folder: Path) -> Path:
    """Make code and VAE in `folder`; the path of the finished weights."""
    variant = VARIANTS["nano-video"]
    side, num_frames = variant.resolutions[0][0], variant.num_frames
    code_path = folder / "code.safetensors"
    if not code_path.exists():
        fit_linear_code(SEED, side).save(code_path)
    code = LinearCode.load(code_path)
    clips = drawn_clips(SEED + 2, 1600, num_frames, side)
    torch.manual_seed(SEED)
    vae = HunyuanVAE(variant.vae)
    initialise(vae)
    pieces = CodeReconstruction(clips, code, batch_size=8, num_frames=9, crop=32)
    whole = CodeReconstruction(clips, code, batch_size=3, num_frames=num_frames, crop=side, joint_weight=2.0)
    average = fit(vae, pieces, PIECES, folder / "vae-pieces")
    vae.load_state_dict(average.state_dict())
    average = fit(vae, whole, replace(WHOLE), folder / "vae-whole")
    result = folder / "vae.safetensors"
    write_tensors(result, average.state_dict())
    return result


def train_picture_vae(folder: Path) -> Path:
    """Make code and VAE of pictures in `folder`; the path of the finished weights."""
    code_path = folder / "code.safetensors"
    if not code_path.exists():
        fit_picture_code(SEED + 7, NANO_IMAGE_SIZES).save(code_path)
    code = LinearCode.load(code_path)
    pictures = drawn_clips(SEED + 8, 6000, 1, 64)
    torch.manual_seed(SEED)
    vae = FluxVAE(NANO_IMAGE_VAE)
    initialise(vae)
    pieces = CodeReconstruction(pictures, code, batch_size=24, num_frames=1, crop=32)
    whole = CodeReconstruction(pictures, code, batch_size=12, num_frames=1, crop=64, joint_weight=2.0)
    average = fit(vae, pieces, PICTURE_PIECES, folder / "vae-pieces")
    vae.load_state_dict(average.state_dict())
    average = fit(vae, whole, PICTURE_WHOLE, folder / "vae-whole")
    result = folder / "vae.safetensors"
    write_tensors(result, average.state_dict())
    return result
