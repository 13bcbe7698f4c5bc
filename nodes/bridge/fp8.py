"""fp8 weights for our MODEL through ComfyUI's own quantised layers, which its LoRAs, offloading and casts know."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...kandinsky5_core.memory.quantized import is_block_weight
from ...kandinsky5_core.weights.container import TensorRecord
from ...kandinsky5_core.weights.detect import Identified
from ...kandinsky5_core.weights.load import read_tensors, read_weights
from ...kandinsky5_core.weights.modules import build_on_meta
from .dit import ComfyDiT

log = logging.getLogger(__name__)

FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_STORED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def stored_fp8(found: Identified) -> torch.dtype | None:
    """The fp8 dtype that the blocks' weights of a file have; None where they have another."""
    dtypes = {record.dtype for name, record in found.records.items() if is_block_weight(name, record.shape)}
    return next((_STORED[code] for code in _STORED if code in dtypes), None)


def fill_fp8(
    build: Callable[[Any], ComfyDiT], found: Identified, *, fp8: torch.dtype, dtype: torch.dtype, fast: bool
) -> ComfyDiT:
    """The DiT with the weights of its blocks' linear layers in fp8 with one scale each, the rest in `dtype`.

    Args:
        build: Makes the DiT from a layer factory.
        fast: Products in fp8 too, where the device computes in it; otherwise in the dtype of what comes in.
    """
    native = comfy.model_management.supports_fp8_compute(comfy.model_management.get_torch_device())
    if fast and not native:
        log.warning("Kandinsky 5: this device does not compute in fp8; the products run in %s", dtype)
    ops = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=not (fast and native))
    dit = build_on_meta(lambda: build(ops))
    scales = found.scales or {}
    layers = {name: record for name, record in found.records.items() if is_block_weight(name, record.shape)}
    rest = {name: record for name, record in found.records.items() if name not in layers}
    state = read_weights(rest, {name: scales[name] for name in rest if name in scales}, dtype=dtype)
    for name, record in layers.items():
        weight, scale = _quantised(name, record, scales.get(name), fp8)
        stem = name.removesuffix("weight")
        state.update({name: weight, f"{stem}weight_scale": scale, f"{stem}comfy_quant": _mark(fp8)})
    dit.load_state_dict(state, assign=True)
    return dit


def _quantised(
    name: str, record: TensorRecord, scale: TensorRecord | None, fp8: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(weights in fp8, scale ()): as they are in the file where that is the same, else by their largest."""
    if _STORED.get(record.dtype) == fp8 and (scale is None or scale.numel == 1):
        factor = torch.ones(()) if scale is None else read_tensors({name: scale}, dtype=torch.float32)[name]
        return read_tensors({name: record})[name].clone(), factor.reshape(())
    scales = {} if scale is None else {name: scale}
    weight = read_weights({name: record}, scales, dtype=torch.float32)[name]
    factor = weight.abs().max().clamp_min(1e-12) / torch.finfo(fp8).max
    return (weight / factor).to(fp8), factor


def _mark(fp8: torch.dtype) -> Tensor:
    return torch.tensor(list(json.dumps({"format": FORMATS[fp8]}).encode()), dtype=torch.uint8)
