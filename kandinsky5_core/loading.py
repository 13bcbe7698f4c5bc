"""From a name or files to the models of one variant."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import Variant, variant
from .dit.model import DiffusionTransformer
from .memory.block_swap import BlockSwap
from .memory.options import AS_IS, MemoryOptions
from .memory.quantized import load_quantized_dit, torchao_config
from .memory.quantized_text import text_quantiser
from .pipeline import Models
from .text.encoder import TextEncoder, load_text_encoder
from .vae.flux import FluxVAE
from .vae.hunyuan.model import HunyuanVAE
from .weights.detect import inspect_file
from .weights.hashing import model_hash
from .weights.load import load_dit, load_vae

log = logging.getLogger(__name__)

NANO_FOLDER = Path(__file__).parent / "nano"
_EMBEDDED = {"nano-video": ("video", "video"), "nano-image": ("image", "image"), "nano-edit": ("edit", "image")}
"""Folders below `NANO_FOLDER`: of the DiT, and of the text encoders and the VAE."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the parts of one variant lie."""

    variant: Variant
    dit: Path
    text_encoder: Path
    clip: Path
    vae: Path
    variant_named: bool = True
    """The user chose the row; otherwise the size asked for may choose among rows of the same checkpoint."""
    tokenizers: Path | None = None
    """Folder that the user named, or None: beside the weights, else the hub."""


def find_files(
    model: str | Path = "nano-video", *, text_encoder: str | Path | None = None, clip: str | Path | None = None,
    vae: str | Path | None = None, tokenizers: str | Path | None = None, variant_name: str | None = None,
) -> ModelFiles:  # fmt: skip
    """Which files make up the model; nothing is loaded, but all of them are there.

    Args:
        model: An embedded model's name, or the path of a DiT file or folder. A diffusers pipeline folder also
            brings its own text_encoder, text_encoder_2 and vae.
        tokenizers: Folder with the Qwen and CLIP tokenizers, or of a ComfyUI installation.
        variant_name: A row of `VARIANTS`, where one file serves several (HD and SD, say).

    Raises:
        ValueError: a part is missing or is something else; says which option to give.
    """
    if str(model) in _EMBEDDED:
        return _embedded_files(str(model))
    path = Path(model)
    if not path.exists():
        raise ValueError(f"--model '{model}' is neither a file or folder nor an embedded model ({_names()})")
    info = inspect_file(path, want="dit")
    if info.kind != "dit":
        raise ValueError(f"--model {path} looks like {info.looks_like}; expected a Kandinsky 5 DiT")
    chosen = variant_name or info.variant
    if chosen is None:
        raise ValueError(f"--model {path} has sizes of no released variant; name one with --variant")
    parts = {
        "text_encoder": _part(path, text_encoder, "text_encoder", "--text-encoder"),
        "clip": _part(path, clip, "text_encoder_2", "--clip"),
        "vae": _part(path, vae, "vae", "--vae"),
    }
    if tokenizers is not None and not Path(tokenizers).is_dir():
        raise ValueError(f"--tokenizers '{tokenizers}' is not a folder")
    log.info("variant %s (%s)", chosen, info.variant_reason)
    return ModelFiles(
        variant=variant(chosen),
        dit=path,
        **parts,
        variant_named=variant_name is not None,
        tokenizers=Path(tokenizers) if tokenizers else None,
    )


def load(
    model: str | Path = "nano-video", *, text_encoder: str | Path | None = None, clip: str | Path | None = None,
    vae: str | Path | None = None, tokenizers: str | Path | None = None, variant_name: str | None = None,
    device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None, memory: MemoryOptions | None = None,
) -> Models:  # fmt: skip
    """Load a model by name or from files; see `find_files` for what the arguments may be.

    Args:
        device: Where to compute. The networks wait on the CPU and go there for their own stage, unless `memory` says
            otherwise.
        dtype: 'fp32', 'fp16' or 'bf16'; default bf16 on an accelerator and fp32 on the CPU.
        memory: Quantised weights, swapped blocks, offloading.

    Raises:
        ValueError: a part is missing, foreign, damaged or of another model; a memory option does not fit or needs a
            package.
    """
    files = find_files(
        model, text_encoder=text_encoder, clip=clip, vae=vae, tokenizers=tokenizers, variant_name=variant_name
    )
    return load_files(files, device=device, dtype=dtype, memory=memory)


def load_files(
    files: ModelFiles,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    lm_head: bool = False,
    memory: MemoryOptions | None = None,
) -> Models:
    """The models of files that `find_files` found; `lm_head` also loads what the prompt enhancer needs."""
    device, memory = check_device(str(device)), memory or MemoryOptions()
    check_memory(memory, files.variant)
    weights_dtype = resolve_dtype(dtype, device)
    dit = load_dit_of(files, weights_dtype, memory.weights)
    swap = BlockSwap(dit, memory.swap_blocks, device) if memory.swap_blocks else None
    return Models(
        variant=files.variant, dit=dit, vae=load_vae_of(files, weights_dtype),
        text_encoder=load_text_of(files, weights_dtype, lm_head=lm_head, weights=memory.text_weights), device=device,
        dtype=weights_dtype, model_hash=model_hash(files.dit, want="dit"), variant_named=files.variant_named,
        weights=files.dit, memory=memory, swap=swap,
    )  # fmt: skip


def check_memory(memory: MemoryOptions, variant: Variant) -> None:
    """Refuse memory options that cannot be had, before anything is loaded.

    Raises:
        ValueError: more blocks than the model has, or a package is missing.
    """
    if memory.weights != AS_IS:
        torchao_config(memory.weights)
    text_quantiser(memory.text_weights)
    blocks = variant.dit.num_visual_blocks
    if memory.swap_blocks > blocks:
        raise ValueError(f"swap_blocks {memory.swap_blocks} is more than the {blocks} visual blocks of {variant.name}")


def load_dit_of(files: ModelFiles, dtype: torch.dtype, weights: str = AS_IS) -> DiffusionTransformer:
    """The DiT alone, on the CPU; `weights` as in `MemoryOptions`."""
    if weights == AS_IS:
        dit, info = load_dit(files.dit, dtype=dtype)
        if any(name.startswith("fp8") for name in info.dtypes):
            log.warning("the DiT's fp8 weights become %s in memory; weights fp8 keeps them as they are", dtype)
    else:
        dit, _ = load_quantized_dit(files.dit, weights, dtype=dtype)
        log.info("linear layers of the DiT's blocks are kept in %s", weights)
    if dit.config != files.variant.dit:
        raise ValueError(f"--model {files.dit} does not have the sizes of variant {files.variant.name}")
    return dit.eval()


def load_vae_of(files: ModelFiles, dtype: torch.dtype) -> HunyuanVAE | FluxVAE:
    """The VAE alone, on the CPU."""
    vae, vae_info = load_vae(files.vae, dtype=dtype)
    if vae_info.config.kind != files.variant.vae.kind:
        raise ValueError(
            f"--vae {files.vae} is a {vae_info.config.kind} VAE; {files.variant.name} needs {files.variant.vae.kind}"
        )
    return vae.eval()


def load_text_of(
    files: ModelFiles, dtype: torch.dtype, *, lm_head: bool = False, weights: str = AS_IS
) -> TextEncoder:
    """The text encoders alone, on the CPU.

    Args:
        lm_head: Also load what the prompt enhancer needs.
        weights: `text_weights` of `MemoryOptions`.
    """
    folder = files.tokenizers
    named = {"comfyui": folder} if folder and (folder / "comfy").is_dir() else _tokenizer_folders(folder)
    return load_text_encoder(
        files.text_encoder, files.clip, **named, lm_head=lm_head, local_files_only=_is_embedded(files), dtype=dtype,
        quantise=text_quantiser(weights),
    )  # fmt: skip


def check_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: torch does not know it or it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}; try cpu") from error
    return device


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype meant; None is bf16 on an accelerator and fp32 on the CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _embedded_files(name: str) -> ModelFiles:
    own, shared = (NANO_FOLDER / folder for folder in _EMBEDDED[name])
    return ModelFiles(
        variant=variant(name), dit=own / "dit.safetensors", text_encoder=shared / "qwen", clip=shared / "clip",
        vae=shared / "vae.safetensors",
    )  # fmt: skip


def _names() -> str:
    return ", ".join(_EMBEDDED)


def _is_embedded(files: ModelFiles) -> bool:
    return files.variant.family.startswith("Nano")


def _tokenizer_folders(folder: Path | None) -> dict[str, Path]:
    """A folder for both tokenizers, or one with a sub-folder for each (`tokenizer`, `tokenizer_2`)."""
    if folder is None:
        return {}
    clip = folder / "tokenizer_2"
    qwen = folder / "tokenizer"
    return {"qwen_tokenizer": qwen if qwen.is_dir() else folder, "clip_tokenizer": clip if clip.is_dir() else folder}


def _part(model: Path, given: str | Path | None, subfolder: str, option: str) -> Path:
    """The file the user named, else the sub-folder of a diffusers pipeline folder."""
    if given is None and model.is_dir() and (model / subfolder).is_dir():
        return model / subfolder
    if given is None:
        raise ValueError(f"--model {model} needs {option} FILE_OR_FOLDER as well")
    if not Path(given).exists():
        raise ValueError(f"{option} '{given}' does not exist")
    return Path(given)
