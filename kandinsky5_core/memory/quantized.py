"""Linear layers of a DiT's blocks in eight bits, through torchao: applied from outside, gradients pass through."""

from __future__ import annotations

from torch import nn

from ..dit.model import DiffusionTransformer

KINDS = ("int8", "fp8")


def quantize_blocks(dit: DiffusionTransformer, kind: str) -> None:
    """Keep the weights of the blocks' linear layers as 'int8' or 'fp8' with a scale a row; the products run in the
    layers' own dtype. Half the memory of bf16. The weights are frozen by it.

    Raises:
        ValueError: unknown kind, or torchao is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"weights in '{kind}' are unknown; use one of {', '.join(KINDS)}")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(f"weights in {kind} need torchao: pip install torchao") from error
    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    dit.requires_grad_(False)
    for blocks in (dit.text_transformer_blocks, dit.visual_transformer_blocks):
        quantize_(blocks, config, filter_fn=_is_block_linear)


def _is_block_linear(module: nn.Module, name: str) -> bool:
    # Modulation is small, runs in fp32 and steers everything.
    return isinstance(module, nn.Linear) and "modulation" not in name
