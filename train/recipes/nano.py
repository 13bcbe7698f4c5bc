"""How the embedded Nano models are made, from nothing: `python -m train.recipes.nano --folder runs/nano`.

Stages of clips and of pictures: text encoders, VAE, DiTs, export. Each goes on from its own checkpoint, so the
command can be stopped and given again. `--install` copies the result into the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kandinsky5_core.config import NANO_IMAGE_VAE, NANO_VIDEO_VAE, VAEConfig
from kandinsky5_core.loading import NANO_FOLDER
from kandinsky5_core.text.encoder import TextEncoder, load_text_encoder
from kandinsky5_core.weights.deduce import CONFIG_KEY
from kandinsky5_core.weights.variants import VARIANT_KEY

from ..checkpoint import write_tensors
from .nano_dit import train_dit
from .nano_picture_dit import train_picture_dit
from .nano_text import train_picture_text, train_text
from .nano_vae import train_picture_vae, train_vae


def make_nano(folder: Path) -> Path:
    """Train what is not trained yet and export: a folder that holds `video`, `image` and `edit`."""
    make_video(folder / "video-run", folder / "video")
    make_pictures(folder)
    return folder


def make_video(folder: Path, target: Path) -> None:
    """`nano-video`, trained in `folder`, exported to `target`."""
    _train_shared(folder, train_text, train_vae)
    if not (folder / "dit.safetensors").exists():
        train_dit(folder, _encoder(folder))
    _export_shared(folder, target, NANO_VIDEO_VAE)
    _export_dit(folder, target, "nano-video")


def make_pictures(folder: Path) -> None:
    """`nano-image` and `nano-edit`: one pair of text encoders and one VAE, and a DiT each."""
    shared = folder / "image-run"
    _train_shared(shared, train_picture_text, train_picture_vae)
    _export_shared(shared, folder / "image", NANO_IMAGE_VAE)
    for name in ("image", "edit"):
        run = folder / f"{name}-run"
        if not (run / "dit.safetensors").exists():
            train_picture_dit(run, shared, _encoder(shared), f"nano-{name}")
        _export_dit(run, folder / name, f"nano-{name}")


def _train_shared(folder: Path, text: Callable[[Path], object], vae: Callable[[Path], object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "qwen" / "model.safetensors").exists():
        text(folder)
    if not (folder / "vae.safetensors").exists():
        vae(folder)


def _encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder / "qwen", folder / "clip", local_files_only=True, dtype=torch.float32)


def _export_shared(folder: Path, target: Path, config: VAEConfig) -> None:
    """Text encoders and VAE in fp16."""
    target.mkdir(exist_ok=True)
    for name in ("qwen", "clip"):
        shutil.copytree(folder / name, target / name, dirs_exist_ok=True)
    vae = with_scaling(load_file(folder / "vae.safetensors"), config)
    half = {name: tensor.half() for name, tensor in vae.items()}
    write_tensors(target / "vae.safetensors", half, {CONFIG_KEY: json.dumps(dataclasses.asdict(config))})


def _export_dit(folder: Path, target: Path, name: str) -> None:
    target.mkdir(exist_ok=True)
    dit = {key: tensor.half() for key, tensor in load_file(folder / "dit.safetensors").items()}
    write_tensors(target / "dit.safetensors", dit, {VARIANT_KEY: name})


def with_scaling(weights: dict[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The VAE with its raw latents larger by 1/scaling_factor, as the released VAEs have them.

    The training code is unit-scaled; the factor goes into the convolutions around the latents: the two 1x1x1 ones of
    the video class, and the encoder's last and the decoder's first of the FLUX class.
    """
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    before, after = ("quant_conv", "post_quant_conv")
    if config.kind == "flux":
        before, after = ("encoder.conv_out", "decoder.conv_in")
    mean = slice(0, config.latent_channels)
    for name in (f"{before}.weight", f"{before}.bias"):
        weights[name][mean] /= config.scaling_factor
    weights[f"{before}.bias"][config.latent_channels :] -= 2 * math.log(config.scaling_factor)
    weights[f"{after}.weight"] *= config.scaling_factor
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
        for name in ("video", "image", "edit"):
            shutil.copytree(result / name, NANO_FOLDER / name, dirs_exist_ok=True)
    sys.stdout.write(f"{NANO_FOLDER if args.install else result}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
