"""How the embedded Nano models are made, from nothing: `python -m train.recipes.nano --folder runs/nano`.

Stages: text encoders, VAE, DiT, export. Each goes on from its own checkpoint, so the command can be stopped and
given again. `--install` copies the result into the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kandinsky5_core.config import NANO_VIDEO_VAE, VAEConfig
from kandinsky5_core.loading import NANO_FOLDER
from kandinsky5_core.text.encoder import load_text_encoder
from kandinsky5_core.weights.deduce import CONFIG_KEY
from kandinsky5_core.weights.variants import VARIANT_KEY

from ..checkpoint import write_tensors
from .nano_dit import train_dit
from .nano_text import train_text
from .nano_vae import train_vae


def make_nano(folder: Path) -> Path:
    """Train what is not trained yet and export; the folder of the finished model."""
    qwen, clip = folder / "qwen", folder / "clip"
    if not (qwen / "model.safetensors").exists():
        train_text(folder)
    vae = folder / "vae.safetensors"
    if not vae.exists():
        train_vae(folder)
    dit = folder / "dit.safetensors"
    if not dit.exists():
        train_dit(folder, load_text_encoder(qwen, clip, local_files_only=True, dtype=torch.float32))
    return export(folder)


def export(folder: Path) -> Path:
    """Write the trained parts in fp16 as one model folder."""
    target = folder / "video"
    target.mkdir(exist_ok=True)
    for name in ("qwen", "clip"):
        shutil.copytree(folder / name, target / name, dirs_exist_ok=True)
    dit = {name: tensor.half() for name, tensor in load_file(folder / "dit.safetensors").items()}
    write_tensors(target / "dit.safetensors", dit, {VARIANT_KEY: "nano-video"})
    vae = with_scaling(load_file(folder / "vae.safetensors"), NANO_VIDEO_VAE)
    config = json.dumps(dataclasses.asdict(NANO_VIDEO_VAE))
    half = {name: tensor.half() for name, tensor in vae.items()}
    write_tensors(target / "vae.safetensors", half, {CONFIG_KEY: config})
    return target


def with_scaling(weights: dict[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The VAE with its raw latents larger by 1/scaling_factor, as the released VAEs have them.

    The training code is unit-scaled; the factor goes into the two 1x1x1 convolutions around the latents.
    """
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    mean = slice(0, config.latent_channels)
    for name in ("quant_conv.weight", "quant_conv.bias"):
        weights[name][mean] /= config.scaling_factor
    weights["quant_conv.bias"][config.latent_channels :] -= 2 * math.log(config.scaling_factor)
    weights["post_quant_conv.weight"] *= config.scaling_factor
    return weights


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/nano"), help="for checkpoints and the result")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--install", action="store_true", help="copy the result into kandinsky5_core/nano")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result = make_nano(args.folder)
    if args.install:
        shutil.copytree(result, NANO_FOLDER / "video", dirs_exist_ok=True)
    sys.stdout.write(f"{NANO_FOLDER / 'video' if args.install else result}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
