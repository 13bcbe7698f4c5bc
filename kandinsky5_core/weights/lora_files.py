"""Writing LoRA files under the key names of a loader, and reading them without their model.

A file means the same wherever it loads: layouts without a place for alpha (official, diffusers) get it multiplied into
the up matrix, because their loaders take alpha from elsewhere or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .container import TensorRecord
from .lora import ALPHA_KEYS, PEFT_METADATA, Lora, read_lora
from .low_rank import lora_deltas
from .source import open_source
from .stream import CODES, StreamWriter

FORMATS = ("official", "diffusers", "comfyui", "kohya")
WITH_ALPHA = ("comfyui", "kohya")
"""Layouts that keep alpha as a tensor."""
TARGET_SUFFIXES = (
    "self_attention.to_query", "self_attention.to_key", "self_attention.to_value", "self_attention.out_layer",
    "cross_attention.to_query", "cross_attention.to_key", "cross_attention.to_value", "cross_attention.out_layer",
    "feed_forward.in_layer", "feed_forward.out_layer",
)  # fmt: skip
"""The ten linear layers of a block that LoRAs of Kandinsky 5 move."""

Pair = tuple[Tensor, Tensor, float]
"""Down (rank, in), up (out, rank) and scale (alpha / rank)."""


def write_lora(target: Path, tensors: Mapping[str, Tensor], layout: str, metadata: Mapping[str, str]) -> None:
    """Write tensors by module (`X.lora_A.weight`, `X.lora_B.weight`, `X.alpha`) under a layout's names.

    Args:
        metadata: `lora_alpha` in it is alpha for the modules that have none of their own; else that is the rank.

    Raises:
        ValueError: unknown layout, or half of a pair is missing.
    """
    tensors = dict(tensors)
    if "lora_alpha" in metadata:
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            alpha = torch.tensor(float(metadata["lora_alpha"]))
            tensors.setdefault(f"{name.removesuffix('.lora_A.weight')}.alpha", alpha)
    pairs = lora_deltas(Lora(tensors=tensors, unmatched=[], trigger="", rank=0))
    shapes = {module: (len(down), down.shape[1], len(up)) for module, (down, up, _) in pairs.items()}
    dtypes = {module: down.dtype for module, (down, _, _) in pairs.items()}
    alphas = {scale * len(down) for down, _, scale in pairs.values()}
    metadata = {**metadata, "lora_alpha": f"{alphas.pop():g}"} if len(alphas) == 1 else without_alpha(metadata)
    write_pairs(target, shapes, pairs.__getitem__, layout, metadata, dtypes=dtypes)


def write_pairs(
    target: Path,
    shapes: Mapping[str, tuple[int, int, int]],
    pair_of: Callable[[str], Pair],
    layout: str,
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, torch.dtype],
    on_tensor: Callable[[int, int], None] | None = None,
) -> None:
    """Write pairs one after another; only one is in memory.

    Args:
        shapes: (rank, in, out) by module.
        pair_of: Makes the pair of a module.
        on_tensor: Called with the number of modules done, and of all; what it raises leaves no file.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in FORMATS:
        raise ValueError(f"layout '{layout}' is unknown; use one of {', '.join(FORMATS)}")
    records: dict[str, TensorRecord] = {}
    for module, (rank, inner, outer) in shapes.items():
        code = CODES[dtypes[module]]
        records[named_for(f"{module}.lora_A.weight", layout)] = TensorRecord((rank, inner), code)
        records[named_for(f"{module}.lora_B.weight", layout)] = TensorRecord((outer, rank), code)
        if layout in WITH_ALPHA:
            records[named_for(f"{module}.alpha", layout)] = TensorRecord((), "F32")
    ranks = {rank for rank, _, _ in shapes.values()}
    metadata = without_peft(metadata)
    if layout not in WITH_ALPHA:
        metadata = {**without_alpha(metadata), **({"lora_alpha": str(*ranks)} if len(ranks) == 1 else {})}
    with StreamWriter(Path(target), records, metadata) as writer:
        for number, module in enumerate(shapes, 1):
            down, up, scale = pair_of(module)
            if layout not in WITH_ALPHA and scale != 1:
                up = up.float() * scale
            writer.write(named_for(f"{module}.lora_A.weight", layout), down)
            writer.write(named_for(f"{module}.lora_B.weight", layout), up)
            if layout in WITH_ALPHA:
                writer.write(named_for(f"{module}.alpha", layout), torch.tensor(scale * len(down)))
            if on_tensor is not None:
                on_tensor(number, len(shapes))


def without_alpha(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that says nothing of alpha."""
    return {key: value for key, value in metadata.items() if key not in ALPHA_KEYS}


def without_peft(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without PEFT's settings, which tell rank and alpha of the file they came with."""
    return {key: value for key, value in metadata.items() if key != PEFT_METADATA}


def named_for(name: str, layout: str) -> str:
    """A tensor's name in a layout; of alphas only in layouts that keep them."""
    for end, kohya in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")):
        if name.endswith(end):
            module = name.removesuffix(end)
            return {
                "official": f"base_model.model.{module}{end.replace('.weight', '.default.weight')}",
                "diffusers": f"transformer.{module}{end}",
                "comfyui": f"diffusion_model.{module}{end}",
                "kohya": f"lora_unet_{module.replace('.', '_')}{kohya}",
            }[layout]
    assert layout in WITH_ALPHA and name.endswith(".alpha")
    if layout == "kohya":
        return f"lora_unet_{name.removesuffix('.alpha').replace('.', '_')}.alpha"
    return f"diffusion_model.{name}"


def lora_format(lora: Path) -> str:
    """Which key names a file uses."""
    names = list(open_source(lora).tensors)
    for layout, beginning in (
        ("official", "base_model.model."),
        ("kohya", "lora_unet_"),
        ("comfyui", "diffusion_model."),
    ):
        if any(name.startswith(beginning) for name in names):
            return layout
    return "diffusers"


def read_any(lora: Path) -> tuple[Lora, dict[str, str]]:
    """A LoRA without its model: modules by the names in the file, shapes unchecked.

    Raises:
        ValueError: the file is no LoRA of a Kandinsky 5.
    """
    source = open_source(lora)
    return read_lora(lora, dict.fromkeys(_any_modules(list(source.tensors)))), dict(source.metadata)


def _any_modules(names: list[str]) -> set[str]:
    """Every module that a block may have and the file may mean."""
    numbers = {int(part) for name in names for part in name.replace(".", "_").split("_") if part.isdigit()}
    found = set()
    for number in numbers:
        for suffix in TARGET_SUFFIXES:
            found.add(f"visual_transformer_blocks.{number}.{suffix}")
            if not suffix.startswith("cross"):
                found.add(f"text_transformer_blocks.{number}.{suffix}")
        found.add(f"visual_transformer_blocks.{number}.visual_modulation.out_layer")
        found.add(f"text_transformer_blocks.{number}.text_modulation.out_layer")
    return found | {
        "visual_embeddings.in_layer", "text_embeddings.in_layer", "pooled_text_embeddings.in_layer",
        "time_embeddings.in_layer", "time_embeddings.out_layer", "out_layer.out_layer",
        "out_layer.modulation.out_layer",
    }  # fmt: skip
