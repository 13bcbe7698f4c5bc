"""What can be done with LoRA files: bake into a base, take from a fine-tune, change rank, rename keys, describe.

All of it goes tensor by tensor from file to file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .container import TensorRecord
from .hashing import model_hash
from .load import identify_wanted, read_tensors
from .lora import Lora, read_lora
from .soup import BASE_KEY
from .source import open_source
from .stream import CODES, StreamWriter, planned

FORMATS = ("official", "diffusers", "comfyui", "kohya")
TARGET_SUFFIXES = (
    "self_attention.to_query", "self_attention.to_key", "self_attention.to_value", "self_attention.out_layer",
    "cross_attention.to_query", "cross_attention.to_key", "cross_attention.to_value", "cross_attention.out_layer",
    "feed_forward.in_layer", "feed_forward.out_layer",
)  # fmt: skip
"""The ten linear layers of a block that LoRAs of Kandinsky 5 move."""

OnTensor = Callable[[int, int], None]


def merge_lora(
    base: Path, lora: Path, target: Path, *, strength: float = 1.0, on_tensor: OnTensor | None = None
) -> dict[str, object]:
    """Bake a LoRA into a base model: `target` has the base's names, dtypes and metadata.

    Raises:
        ValueError: the base is no DiT, or the LoRA does not fit it.
    """
    records = _weights(base)
    found = read_lora(lora, _shapes(records))
    deltas = lora_deltas(found)
    source = open_source(base, want="dit")
    plan = planned(records)
    with StreamWriter(Path(target), plan, dict(source.metadata)) as writer:
        for number, name in enumerate(plan, 1):
            tensor = read_tensors({name: records[name]})[name]
            pair = deltas.get(name.removesuffix(".weight"))
            if pair is not None:
                tensor = tensor.float() + strength * delta(*pair)
            writer.write(name, tensor)
            if on_tensor is not None:
                on_tensor(number, len(plan))
    return {"merged": len(deltas), "unmatched": len(found.unmatched), "strength": strength, "target": str(target)}


def extract_lora(
    base: Path, tuned: Path, target: Path, *, rank: int, layout: str = "diffusers", trigger: str = "",
    on_tensor: OnTensor | None = None,
) -> dict[str, object]:  # fmt: skip
    """The difference of a fine-tune from its base as a LoRA, by truncated SVD; how much of it the rank keeps.

    Raises:
        ValueError: the models are of different sizes, or the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    before, after = _weights(base), _weights(tuned)
    if _shapes(before) != _shapes(after):
        raise ValueError(
            f"{Path(base).name} and {Path(tuned).name} have different sizes; extract needs a fine-tune of the base"
        )
    modules = [name for name in _shapes(before) if name.endswith(TARGET_SUFFIXES)]
    tensors: dict[str, Tensor] = {}
    kept, total = 0.0, 0.0
    for number, module in enumerate(modules, 1):
        name = f"{module}.weight"
        change = read_tensors({name: after[name]})[name].float() - read_tensors({name: before[name]})[name].float()
        down, up, share = truncated(change, rank)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
        kept, total = kept + share[0], total + share[1]
        if on_tensor is not None:
            on_tensor(number, len(modules))
    metadata = {"lora_alpha": str(rank), "rank": str(rank), BASE_KEY: model_hash(base, want="dit"), "trigger": trigger}
    write_lora(target, tensors, layout, {key: value for key, value in metadata.items() if value})
    return {
        "modules": len(modules),
        "rank": rank,
        "kept": round(kept / total, 6) if total else 1.0,
        "target": str(target),
    }


def resize_lora(lora: Path, target: Path, *, rank: int, layout: str | None = None) -> dict[str, object]:
    """The same LoRA at another rank, by SVD of each layer's product; how much of it the rank keeps."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    found, metadata = read_any(lora)
    tensors: dict[str, Tensor] = {}
    kept, total = 0.0, 0.0
    for module, pair in lora_deltas(found).items():
        down, up, share = truncated(delta(*pair), rank)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
        kept, total = kept + share[0], total + share[1]
    metadata = {**metadata, "lora_alpha": str(rank), "rank": str(rank)}
    write_lora(target, tensors, layout or lora_format(lora), metadata)
    return {
        "modules": len(tensors) // 2,
        "rank": rank,
        "kept": round(kept / total, 6) if total else 1.0,
        "target": str(target),
    }


def convert_lora(lora: Path, target: Path, *, layout: str) -> dict[str, object]:
    """The same LoRA under the key names of another loader."""
    found, metadata = read_any(lora)
    if "lora_alpha" not in metadata:
        alphas = {float(value) for name, value in found.tensors.items() if name.endswith(".alpha")}
        metadata = {**metadata, "lora_alpha": f"{alphas.pop():g}"} if len(alphas) == 1 else metadata
    write_lora(target, found.tensors, layout, metadata)
    return {"tensors": len(found.tensors), "layout": layout, "target": str(target)}


def lora_info(lora: Path) -> dict[str, object]:
    """What a LoRA file is."""
    found, metadata = read_any(lora)
    modules = sorted(name.removesuffix(".lora_A.weight") for name in found.tensors if name.endswith(".lora_A.weight"))
    alphas = sorted({float(value) for name, value in found.tensors.items() if name.endswith(".alpha")})
    return {
        "file": str(lora), "format": lora_format(lora), "modules": len(modules), "rank": found.rank, "alpha": alphas,
        "trigger": found.trigger, "layers": sorted({name.split(".", 2)[-1] for name in modules}), "metadata": metadata,
    }  # fmt: skip


def lora_deltas(lora: Lora) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Down, up and scale (alpha / rank) by module."""
    found = {}
    for name, down in lora.tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        if f"{module}.lora_B.weight" not in lora.tensors:
            raise ValueError(f"the LoRA has no up matrix (lora_B) for {module}; the file is damaged")
        alpha = float(lora.tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))))
        found[module] = (down, lora.tensors[f"{module}.lora_B.weight"], alpha / len(down))
    return found


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(out, in) fp32, what a LoRA adds to a weight at strength 1."""
    return scale * (up.float() @ down.float())


def truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Down (rank, in) and up (out, rank) whose product is nearest to `change`; kept and whole energy."""
    rank = min(rank, *change.shape)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    root = values[:rank].sqrt()
    energy = values.square()
    down, up = (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()
    return down.contiguous(), up.contiguous(), (float(energy[:rank].sum()), float(energy.sum()))


def write_lora(target: Path, tensors: Mapping[str, Tensor], layout: str, metadata: Mapping[str, str]) -> None:
    """Write tensors by module (`X.lora_A.weight`, `X.lora_B.weight`, `X.alpha`) under a layout's names.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in FORMATS:
        raise ValueError(f"layout '{layout}' is unknown; use one of {', '.join(FORMATS)}")
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target_name = named_for(name, layout)
        if target_name is not None:
            named[target_name] = tensor
    if layout == "kohya":
        for name in [name for name in named if name.endswith(".lora_down.weight")]:
            module = name.removesuffix(".lora_down.weight")
            alpha = float(metadata.get("lora_alpha", len(named[name])))
            named.setdefault(f"{module}.alpha", torch.tensor(alpha))
    records = {name: TensorRecord(tuple(tensor.shape), CODES[tensor.dtype]) for name, tensor in named.items()}
    with StreamWriter(Path(target), records, metadata) as writer:
        for name, tensor in named.items():
            writer.write(name, tensor)


def named_for(name: str, layout: str) -> str | None:
    """A tensor's name in a layout; None where the layout has no place for it (alphas go into metadata)."""
    for end, kohya in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")):
        if name.endswith(end):
            module = name.removesuffix(end)
            return {
                "official": f"base_model.model.{module}{end.replace('.weight', '.default.weight')}",
                "diffusers": f"transformer.{module}{end}",
                "comfyui": f"diffusion_model.{module}{end}",
                "kohya": f"lora_unet_{module.replace('.', '_')}{kohya}",
            }[layout]
    if layout == "kohya" and name.endswith(".alpha"):
        return f"lora_unet_{name.removesuffix('.alpha').replace('.', '_')}.alpha"
    return f"diffusion_model.{name}" if layout == "comfyui" and name.endswith(".alpha") else None


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


def _weights(path: Path) -> dict[str, TensorRecord]:
    return dict(identify_wanted(path, "dit").records)


def _shapes(records: Mapping[str, TensorRecord]) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(record.shape)
        for name, record in records.items()
        if name.endswith(".weight")
    }


