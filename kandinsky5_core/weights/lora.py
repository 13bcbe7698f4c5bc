"""LoRA files of every key format: what they hold, by the module names of the DiT.

Four conventions name a module's two matrices: official (`base_model.model.X.lora_A.default.weight`), diffusers
(`transformer.X.lora_A.weight`), ComfyUI (`diffusion_model.X.lora_A.weight`) and kohya (`lora_unet_X` with underscores,
`.lora_down.weight`, `.alpha`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .load import read_tensors
from .source import open_source

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.diffusion_model.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
ENDS = {
    ".lora_A.weight": ".lora_A.weight",
    ".lora_B.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_A.weight",
    ".lora_B.default.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_A.weight",
    ".lora_up.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    ".alpha": ".alpha",
}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA, ready to be applied."""

    tensors: dict[str, Tensor]
    """`X.lora_A.weight` (rank, in), `X.lora_B.weight` (out, rank) and `X.alpha` () for modules X of the DiT."""
    unmatched: list[str]
    """Names in the file that belong to no module of the model."""
    trigger: str
    rank: int


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, ...] | None]) -> Lora:
    """The LoRA of a file for a model.

    Args:
        shapes: Weight shapes (out, in) of the model by module name; None where the model is not at hand.

    Raises:
        ValueError: nothing in the file fits the model: no key, or matrices of other sizes.
    """
    path = Path(path)
    source = open_source(path)
    matched: dict[str, str] = {}
    unmatched: list[str] = []
    for name in source.tensors:
        target = target_name(name, shapes)
        if target is None:
            unmatched.append(name)
        else:
            matched[name] = target
    if not matched:
        raise ValueError(
            f"{path.name} is no LoRA of this model: none of its {len(unmatched)} keys fits ({_some(unmatched)})"
        )
    read = read_tensors({name: source.tensors[name] for name in matched})
    tensors = {target: read[name] for name, target in matched.items()}
    _check_shapes(path, tensors, shapes)
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")]
    metadata = dict(source.metadata)
    alpha = _file_alpha(path, metadata)
    if alpha is not None:
        modules = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
        for module in modules:
            tensors.setdefault(f"{module}.alpha", torch.tensor(float(alpha)))
    return Lora(tensors=tensors, unmatched=unmatched, trigger=metadata.get("trigger", ""), rank=max(ranks, default=0))


def target_name(name: str, modules: Mapping[str, object]) -> str | None:
    """The name of a LoRA tensor by the DiT's modules; None where it belongs to none."""
    for end, canonical in ENDS.items():
        if not name.endswith(end):
            continue
        module = name.removesuffix(end)
        for prefix in ("", *PREFIXES):
            if module.startswith(prefix) and module.removeprefix(prefix) in modules:
                return module.removeprefix(prefix) + canonical
        for prefix in KOHYA_PREFIXES:
            if module.startswith(prefix):
                found = _from_underscores(module.removeprefix(prefix), modules)
                return None if found is None else found + canonical
    return None


def _from_underscores(flat: str, modules: Mapping[str, object]) -> str | None:
    return next((module for module in modules if module.replace(".", "_") == flat), None)


def _check_shapes(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...] | None]
) -> None:
    for name, tensor in tensors.items():
        for end, axis in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            shape = shapes[name.removesuffix(end)] if name.endswith(end) else None
            if shape is not None and tensor.shape[axis] != shape[axis]:
                raise ValueError(
                    f"{path.name} is a LoRA of another model: {name} has {tuple(tensor.shape)} and the layer is "
                    f"{shape}; load the model it was trained on"
                )


def _file_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Alpha for the whole file: from its metadata, or from `config_lora.json` beside it; None: equal to the rank."""
    for key in ("lora_alpha", "alpha", "ss_network_alpha"):
        if key in metadata:
            return float(metadata[key])
    config = path.with_name("config_lora.json")
    if config.exists():
        return json.loads(config.read_text(encoding="utf-8")).get("lora_alpha")
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
