"""Linear layers of Qwen's language model in eight or four bits: torchao's int8, bitsandbytes' NF4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .options import AS_IS, TEXT_WEIGHTS, check
from .quantized import quantize_linear, torchao_config

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def quantize_qwen(qwen: Qwen2_5_VLForConditionalGeneration, kind: str) -> None:
    """The language model's layers in place, one after another; embeddings, vision tower and head stay.

    Args:
        kind: 'int8', a scale a row, half the memory of bf16; 'nf4', a scale for 64 weights, between a quarter and a
            third; 'as-is' does nothing.

    Raises:
        ValueError: unknown kind, or its package is not installed.
    """
    check_text_package(kind)
    if kind == AS_IS:
        return
    config = torchao_config("int8") if kind == "int8" else None
    for layer in list(qwen.model.language_model.layers.modules()):
        for name, child in list(layer.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if config is not None:
                quantize_linear(child, config)
            else:
                setattr(layer, name, as_nf4(child))


def check_text_package(kind: str) -> None:
    """Refuse what cannot be done here, before anything is loaded.

    Raises:
        ValueError: unknown kind, or its package is not installed.
    """
    check("text_weights", kind, TEXT_WEIGHTS)
    if kind == "int8":
        torchao_config(kind)
    if kind == "nf4":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("text weights in nf4 need bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes


def as_nf4(layer: nn.Linear) -> nn.Module:
    """The layer in NF4, on the same device; its products run in the dtype that it had."""
    library = _bitsandbytes()
    made = library.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = library.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    made.weight = weight.to(layer.weight.device)  # moving is what quantises
    made.bias = layer.bias
    return made.eval()
