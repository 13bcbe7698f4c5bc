"""LoRA files of every key format: what they hold, by the module names of the DiT.

Four conventions name a module's two matrices: official (`base_model.model.X.lora_A.default.weight`), diffusers
(`transformer.X.lora_A.weight`), ComfyUI (`diffusion_model.X.lora_A.weight`) and kohya (`lora_unet_X` with underscores,
`.lora_down.weight`, `.alpha`). docs/lora-formats.md tells which loaders read which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .load import read_tensors
from .source import WeightsSource, open_source, read_json

BASE_KEY = "kandinsky5.base"
"""Metadata of a fine-tune: the content hash of the model it began from."""
SAMPLES_KEY = "kandinsky5.samples"
"""Metadata of a fine-tune: how many training samples its domain has."""
DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default.weight")  # fmt: skip
PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings, among them alpha."""
PEFT_FILES = {"lora.safetensors": "config_lora.json", "adapter_model.safetensors": "adapter_config.json"}
ALPHA_KEYS = ("lora_alpha", "alpha", "ss_network_alpha")

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
        ValueError: nothing in the file fits the model: no key, or matrices of other sizes; or it is a DoRA.
    """
    path = Path(path)
    source = open_source(path)
    check_plain(source)
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
    ends = ".lora_A.weight"
    ranks = {name.removesuffix(ends): len(tensor) for name, tensor in tensors.items() if name.endswith(ends)}
    for module, alpha in file_alphas(source, ranks).items():
        tensors.setdefault(f"{module}.alpha", torch.tensor(alpha))
    return Lora(
        tensors=tensors, unmatched=unmatched, trigger=source.metadata.get("trigger", ""),
        rank=max(ranks.values(), default=0),
    )  # fmt: skip


def is_lora(source: WeightsSource) -> bool:
    """Whether a file holds pairs of low rank and no whole model, by its names."""
    return any(name.endswith(end) for name in source.tensors for end in ENDS if end != ".alpha")


def check_plain(source: WeightsSource) -> None:
    """Refuse DoRA: its magnitudes do not add up, and without them the rest means something else.

    Raises:
        ValueError: names the first such key.
    """
    found = [name for name in source.tensors if name.endswith(DORA)]
    if found or peft_settings(source).get("use_dora"):
        named = found[0] if found else "use_dora in its settings"
        raise ValueError(
            f"{source.path.name} is a DoRA ({named}), which is more than a LoRA and is not read here; merge it with "
            "the program that made it, then extract a LoRA from the merged model"
        )


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


def file_alphas(source: WeightsSource, ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha by module, as far as the file or the settings beside it give one for all; else alpha is the rank.

    Args:
        ranks: By module.
    """
    for key in ALPHA_KEYS:
        if key in source.metadata:
            return dict.fromkeys(ranks, float(source.metadata[key]))
    settings = peft_settings(source)
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return {}
    pattern = settings.get("alpha_pattern") or {}
    found = {}
    for module, rank in ranks.items():
        own = next((value for end, value in pattern.items() if f".{module}".endswith(f".{end}")), alpha)
        # rsLoRA divides by the root of the rank where every loader divides by the rank.
        found[module] = float(own) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
    return found


def peft_settings(source: WeightsSource) -> dict[str, Any]:
    """PEFT's settings of a LoRA: from its metadata (diffusers), or the file that belongs to it; {} without.

    The official files come as `lora.safetensors` with `config_lora.json`, PEFT's own as `adapter_model.safetensors`
    with `adapter_config.json`; under other names such a file beside a LoRA may be another one's.
    """
    if PEFT_METADATA in source.metadata:
        settings = json.loads(source.metadata[PEFT_METADATA])
        return {key.removeprefix("transformer."): value for key, value in settings.items()}
    if not source.path.is_file():
        return {}
    alone = len(list(source.path.parent.glob("*.safetensors"))) == 1
    for name, config in PEFT_FILES.items():
        beside = source.path.with_name(config)
        if beside.exists() and (source.path.name == name or alone):
            return read_json(beside)
    return {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
