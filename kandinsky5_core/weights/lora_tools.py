"""What can be done with LoRA files: bake into a base, take from a fine-tune, change rank, rename keys, describe.

All of it goes tensor by tensor from file to file. What `on_tensor(done, total)` raises ends it and leaves no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from .container import TensorRecord
from .hashing import model_hash
from .load import check_dtypes, identify_wanted, read_tensors
from .lora import BASE_KEY, read_lora
from .lora_files import (
    FORMATS,
    TARGET_SUFFIXES,
    WITH_ALPHA,
    lora_format,
    named_for,
    read_any,
    without_alpha,
    write_lora,
    write_pairs,
)
from .low_rank import delta, lora_deltas, truncated, truncated_product
from .source import open_source
from .stream import StreamWriter, planned

__all__ = [
    "FORMATS", "TARGET_SUFFIXES", "WITH_ALPHA", "convert_lora", "delta", "extract_lora", "lora_deltas", "lora_format",
    "lora_info", "merge_lora", "named_for", "read_any", "resize_lora", "truncated", "write_lora",
]  # fmt: skip

OnTensor = Callable[[int, int], None]


def merge_lora(
    base: Path, lora: Path, target: Path, *, strength: float = 1.0, on_tensor: OnTensor | None = None
) -> dict[str, object]:
    """Bake a LoRA into a base model: `target` has the base's names, dtypes and metadata.

    Raises:
        ValueError: the base is no DiT or quantised, or the LoRA does not fit it.
    """
    check_target(target, base, lora)
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
    """The difference of a fine-tune from its base as a LoRA, by truncated SVD.

    Returns:
        `kept`: which part of the change of the LoRA's layers the rank keeps; `outside`: which part of the whole change
        lies in other tensors (norms, biases, modulation), where a LoRA cannot go. Parts of squared norms, 0 to 1.

    Raises:
        ValueError: the models are of different sizes or the same, or the rank is below 1.
    """
    _check_rank(rank)
    _check_layout(layout)
    check_target(target, base, tuned)
    before, after = _weights(base), _weights(tuned)
    if _shapes(before) != _shapes(after):
        raise ValueError(
            f"{Path(base).name} and {Path(tuned).name} have different sizes; extract needs a fine-tune of the base"
        )
    tensors: dict[str, Tensor] = {}
    kept, total, outside = 0.0, 0.0, 0.0
    for number, name in enumerate(before, 1):
        change = read_tensors({name: after[name]})[name].float() - read_tensors({name: before[name]})[name].float()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(TARGET_SUFFIXES):
            pair = truncated(change, rank)
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pair.down, pair.up
            kept, total = kept + pair.kept, total + pair.whole
        else:
            outside += float(change.double().square().sum())
        if on_tensor is not None:
            on_tensor(number, len(before))
    if total + outside == 0:
        raise ValueError(f"{Path(base).name} and {Path(tuned).name} hold the same weights; there is nothing to extract")
    metadata = {"rank": str(rank), BASE_KEY: model_hash(base, want="dit"), "trigger": trigger}
    write_lora(target, tensors, layout, {key: value for key, value in metadata.items() if value})
    return {
        "modules": len(tensors) // 2,
        "rank": rank,
        "kept": round(kept / total, 6) if total else 0.0,
        "outside": round(outside / (total + outside), 6),
        "target": str(target),
    }


def resize_lora(
    lora: Path, target: Path, *, rank: int, layout: str | None = None, on_tensor: OnTensor | None = None
) -> dict[str, object]:
    """The same LoRA at another rank, by SVD of each layer's product; how much of it the rank keeps.

    Raises:
        ValueError: no LoRA, a damaged one, or the rank is below 1.
    """
    _check_rank(rank)
    check_target(target, lora)
    found, metadata = read_any(lora)
    pairs = lora_deltas(found)
    kept, total = 0.0, 0.0

    def smaller(module: str) -> tuple[Tensor, Tensor, float]:
        nonlocal kept, total
        down, up, scale = pairs[module]
        pair = truncated_product(down, up * scale, rank)
        kept, total = kept + pair.kept, total + pair.whole
        return pair.down, pair.up, 1.0

    shapes = {module: (min(rank, down.shape[1], len(up)), down.shape[1], len(up))
              for module, (down, up, _) in pairs.items()}  # fmt: skip
    write_pairs(
        target, shapes, smaller, layout or lora_format(lora), without_alpha({**metadata, "rank": str(rank)}),
        dtypes={module: down.dtype for module, (down, _, _) in pairs.items()}, on_tensor=on_tensor,
    )  # fmt: skip
    return {
        "modules": len(pairs),
        "rank": rank,
        "kept": round(kept / total, 6) if total else 1.0,
        "target": str(target),
    }


def convert_lora(
    lora: Path, target: Path, *, layout: str, on_tensor: OnTensor | None = None
) -> dict[str, object]:
    """The same LoRA under the key names of another loader; what it adds to weights stays.

    Raises:
        ValueError: no LoRA, a damaged one, or an unknown layout.
    """
    _check_layout(layout)
    check_target(target, lora)
    found, metadata = read_any(lora)
    pairs = lora_deltas(found)
    shapes = {module: (len(down), down.shape[1], len(up)) for module, (down, up, _) in pairs.items()}
    write_pairs(
        target, shapes, pairs.__getitem__, layout, without_alpha(metadata),
        dtypes={module: down.dtype for module, (down, _, _) in pairs.items()}, on_tensor=on_tensor,
    )  # fmt: skip
    return {
        "modules": len(pairs), "unmatched": len(found.unmatched), "from": lora_format(lora), "layout": layout,
        "target": str(target),
    }  # fmt: skip


def lora_info(lora: Path) -> dict[str, object]:
    """What a LoRA file is."""
    found, metadata = read_any(lora)
    modules = sorted(name.removesuffix(".lora_A.weight") for name in found.tensors if name.endswith(".lora_A.weight"))
    alphas = sorted({float(value) for name, value in found.tensors.items() if name.endswith(".alpha")})
    return {
        "file": str(lora), "format": lora_format(lora), "modules": len(modules), "rank": found.rank, "alpha": alphas,
        "trigger": found.trigger, "layers": sorted({name.split(".", 2)[-1] for name in modules}),
        "unmatched": len(found.unmatched), "metadata": metadata,
    }  # fmt: skip


def check_target(target: Path, *sources: Path) -> None:
    """Refuse to write over what is read.

    Raises:
        ValueError: the target is one of the sources.
    """
    for source in sources:
        if Path(target).exists() and Path(target).samefile(source):
            raise ValueError(f"{Path(target).name} is also read; write the result to another file")


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def _check_layout(layout: str) -> None:
    if layout not in FORMATS:
        raise ValueError(f"layout '{layout}' is unknown; use one of {', '.join(FORMATS)}")


def _weights(path: Path) -> dict[str, TensorRecord]:
    records = dict(identify_wanted(path, "dit").records)
    check_dtypes(records)
    return records


def _shapes(records: Mapping[str, TensorRecord]) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(record.shape)
        for name, record in records.items()
        if name.endswith(".weight")
    }
