"""Weights in eight bits through ComfyUI's own quantised layers, which its LoRAs, offloading and casts know."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...kandinsky5_core.memory.peak import give_back_freed
from ...kandinsky5_core.memory.quantized import is_block_weight
from ...kandinsky5_core.weights.container import TensorRecord
from ...kandinsky5_core.weights.detect import Identified
from ...kandinsky5_core.weights.load import read_tensors, read_weights
from ...kandinsky5_core.weights.modules import build_on_meta
from ...kandinsky5_core.weights.scaled_fp8 import check_scale, dequantize
from .dit import ComfyDiT

try:
    from comfy import quant_ops
except ImportError:  # an older ComfyUI
    quant_ops = None

log = logging.getLogger(__name__)

FORMATS = {
    torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise",
}  # fmt: skip
"""Dtype of the weights in memory -> ComfyUI's name of the format."""
_STORED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
_INT8_LARGEST = 127


def stored_as(found: Identified) -> torch.dtype | None:
    """The eight-bit dtype that the blocks' weights of a file have; None where they have another."""
    dtypes = {record.dtype for name, record in found.records.items() if is_block_weight(name, record.shape)}
    return next((_STORED[code] for code in _STORED if code in dtypes), None)


def fill_quantised(
    build: Callable[[Any], ComfyDiT], found: Identified, *, stored: torch.dtype, dtype: torch.dtype, fast: bool
) -> ComfyDiT:
    """The DiT with the weights of its blocks' linear layers in eight bits with scales, the rest in `dtype`.

    Args:
        build: Makes the DiT from a layer factory.
        stored: A key of `FORMATS`.
        fast: Products in eight bits too, where the device computes in them; otherwise in the dtype of what comes in.

    Raises:
        ValueError: this ComfyUI does not know the format.
    """
    ops = quantised_ops(stored, dtype, fast=fast)
    dit = build_on_meta(lambda: build(ops))
    scales = found.scales or {}
    layers = {name: record for name, record in found.records.items() if is_block_weight(name, record.shape)}
    rest = {name: record for name, record in found.records.items() if name not in layers}
    state = read_weights(rest, {name: scales[name] for name in rest if name in scales}, dtype=dtype)
    # All at once, so that they share the maps of the file.
    as_they_are = read_tensors({name: record for name, record in layers.items() if _STORED.get(record.dtype) == stored})
    for name, record in layers.items():
        scale = read_tensors({name: scales[name]}, dtype=torch.float32)[name] if name in scales else None
        if name in as_they_are:
            weight, factor = kept_or_again(as_they_are[name], scale)
        else:
            weight, factor = quantise(_wide(name, record, scale), stored)
            give_back_freed()  # the wide copies lie between the small ones that stay
        state |= layer_state(weight, factor, name.removesuffix("weight"))
    dit.load_state_dict(state, assign=True)
    return dit


def _wide(name: str, record: TensorRecord, scale: Tensor | None) -> Tensor:
    if record.dtype in _STORED:
        return dequantize(read_tensors({name: record})[name], scale, torch.float32)
    return read_tensors({name: record}, dtype=torch.float32)[name]


def quantised_ops(stored: torch.dtype, dtype: torch.dtype, *, fast: bool = False) -> Any:
    """ComfyUI's layers for weights in eight bits, as a factory of layers; what is not quantised is in `dtype`.

    Args:
        fast: See `fill_quantised`.

    Raises:
        ValueError: this ComfyUI does not know the format.
    """
    check_format(stored)
    device = comfy.model_management.get_torch_device()
    # For int8 ComfyUI's kernels know by themselves what each device can do.
    native = stored == torch.int8 or comfy.model_management.supports_fp8_compute(device)
    if fast and not native:
        log.warning("Kandinsky 5: this device does not compute in fp8; the products run in %s", dtype)
    ops = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=not (fast and native))
    if fast and native:
        return ops

    class WideProducts(ops):
        """Only the weights are in eight bits: what comes in stays as it is."""

        class Linear(ops.Linear):
            """ComfyUI's layer; its int8 product would round what comes in to eight bits, too."""

            def _forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                wide = weight.dequantize() if isinstance(weight, quant_ops.QuantizedTensor) else weight
                return nn.functional.linear(input, wide, bias)

    return WideProducts


def knows(stored: torch.dtype) -> bool:
    """Whether this ComfyUI has layers for weights of that dtype; those before 0.3.68 have none."""
    if quant_ops is None or not hasattr(comfy.ops, "mixed_precision_ops"):
        return False
    known = getattr(quant_ops, "QUANT_ALGOS", {})
    # Without its package of kernels ComfyUI lists the formats all the same.
    return FORMATS[stored] in known and getattr(quant_ops, "_CK_AVAILABLE", True)


def check_format(stored: torch.dtype) -> None:
    """Refuse a format that this ComfyUI lacks.

    Raises:
        ValueError: says what to do.
    """
    if not knows(stored):
        raise ValueError(
            f"this ComfyUI has no layers for weights in {FORMATS[stored]}; update ComfyUI and its package "
            "comfy-kitchen, or choose another precision"
        )


def quantised_layer(ops: Any, layer: nn.Linear, weight: Tensor, scale: Tensor) -> nn.Module:
    """ComfyUI's layer with this weight (out, in) and scale, and the bias of `layer`."""
    made = build_on_meta(lambda: ops.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
    state = layer_state(weight, scale)
    if layer.bias is not None:
        state["bias"] = layer.bias.detach()
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


def layer_state(weight: Tensor, scale: Tensor, stem: str = "") -> dict[str, Tensor]:
    """Weights in eight bits as ComfyUI's checkpoints hold them, under names that begin with `stem`."""
    mark = json.dumps({"format": FORMATS[weight.dtype]}).encode()
    return {
        f"{stem}weight": weight, f"{stem}weight_scale": scale,
        f"{stem}comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
    }  # fmt: skip


def quantise(weight: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights in eight bits, scales) of weights (out, in): one scale () for fp8, one a row (out, 1) for int8."""
    wide = weight.float()
    if stored == torch.int8:
        factor = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / _INT8_LARGEST
        return (wide / factor).round_().to(torch.int8), factor
    factor = wide.abs().max().clamp_min(1e-12) / torch.finfo(stored).max
    return (wide / factor).to(stored), factor


def kept_or_again(raw: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights in eight bits as a file has them, or rounded anew where ComfyUI's layers cannot take their scales."""
    if scale is None:
        return raw, torch.ones(())
    scale = check_scale(raw, scale).float()
    if raw.dtype == torch.int8 and scale.numel() > 1:
        return raw, scale.reshape(-1, 1)
    if scale.numel() == 1:
        return raw, scale.reshape(())
    return quantise(dequantize(raw, scale, torch.float32), raw.dtype)
