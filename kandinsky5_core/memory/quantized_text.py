"""Linear layers of Qwen's language model in eight or four bits: torchao's int8, bitsandbytes' NF4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .options import AS_IS, TEXT_WEIGHTS, check
from .quantized import quantize_linear, torchao_config


def text_quantiser(kind: str) -> Callable[[nn.Linear], nn.Module] | None:
    """What makes a quantised layer of a plain one; None for 'as-is'. `load_qwen` applies it to the language model's
    layers as it reads them; embeddings, vision tower and head stay.

    Args:
        kind: 'int8', a scale a row, half the memory of bf16; or 'nf4', a scale for 64 weights, between a quarter and a
            third.

    Raises:
        ValueError: unknown kind, or its package is not installed.
    """
    check("text_weights", kind, TEXT_WEIGHTS)
    if kind == AS_IS:
        return None
    if kind == "nf4":
        _bitsandbytes()
        return _as_nf4
    config = torchao_config(kind)

    def as_int8(layer: nn.Linear) -> nn.Module:
        quantize_linear(layer, config)
        return layer

    return as_int8


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("text weights in nf4 need bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes


def _as_nf4(layer: nn.Linear) -> nn.Module:
    library = _bitsandbytes()
    made = library.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = library.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    made.weight = weight.to(layer.weight.device)  # moving is what quantises
    made.bias = layer.bias
    return made.eval()
