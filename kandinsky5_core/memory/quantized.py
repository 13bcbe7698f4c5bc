"""Linear layers of a DiT's blocks in eight bits, through torchao: applied from outside, gradients pass through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dit.model import DiffusionTransformer
from ..weights.container import DTYPES, TensorRecord
from ..weights.detect import WeightsInfo
from ..weights.load import check_dtypes, identify_wanted, read_tensors, read_weights
from ..weights.modules import build_on_meta, module_for
from ..weights.scaled_fp8 import FLOATS, SCALED, check_scale
from .peak import give_back_freed

KINDS = ("int8", "fp8")


def quantize_blocks(dit: DiffusionTransformer, kind: str) -> None:
    """Keep the weights of the blocks' linear layers as 'int8' or 'fp8' with a scale a row; the products run in the
    layers' own dtype. Half the memory of bf16. The weights are frozen by it.

    Raises:
        ValueError: unknown kind, or torchao is not installed.
    """
    config = torchao_config(kind)
    dit.requires_grad_(False)
    for _, layer in block_linears(dit):
        quantize_linear(layer, config)


def load_quantized_dit(
    path: str | Path, kind: str, *, dtype: torch.dtype | None = None
) -> tuple[DiffusionTransformer, WeightsInfo]:
    """`load_dit` and `quantize_blocks` in one: a weight at a time, so that the 16-bit model is never in memory whole.

    fp8 (e4m3) weights of a file are taken as they are where `kind` is fp8, with their scale.

    Args:
        dtype: of what is not quantised, and of the products; None is bf16 for fp8 files, else the file's.

    Raises:
        ValueError: unknown kind, torchao is not installed, or the file is no DiT (WeightsError).
    """
    config = torchao_config(kind)
    found = identify_wanted(path, "dit")
    check_dtypes(found.records, (*FLOATS, *SCALED))
    scales = dict(found.scales or {})
    dit = build_on_meta(lambda: module_for(found.info.config))
    layers = {f"{name}.weight": layer for name, layer in block_linears(dit)}
    rest = {name: record for name, record in found.records.items() if name not in layers}
    rest_scales = {name: record for name, record in scales.items() if name in rest}
    dit.load_state_dict(read_weights(rest, rest_scales, dtype=dtype), strict=False, assign=True)
    for name, layer in layers.items():
        scale = {name: scales[name]} if name in scales else {}
        _fill(layer, {name: found.records[name]}, scale, kind, config, dtype)
        give_back_freed()  # the wide copies lie between the small ones that stay
    return dit.requires_grad_(False), found.info


def _fill(
    layer: nn.Linear, record: dict[str, TensorRecord], scale: dict[str, TensorRecord], kind: str, config: Any,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    ((name, where),) = record.items()
    if kind == "fp8" and where.dtype == "F8_E4M3":
        raw = read_tensors(record)[name].clone()
        factor = read_tensors(scale, dtype=torch.float32).get(name)
        layer.weight = nn.Parameter(_as_stored(raw, factor, dtype or torch.bfloat16), requires_grad=False)
        return
    weight = read_weights(record, scale, dtype=dtype or _own_dtype(where))[name]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_linear(layer, config)


def _own_dtype(record: TensorRecord) -> torch.dtype:
    return torch.bfloat16 if record.dtype in SCALED else DTYPES[record.dtype][1]


def _as_stored(raw: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """e4m3 weights (out, in) of a file, scale of one value or one a row, as torchao's own, with no rounding."""
    from torchao.quantization import Float8Tensor

    rows = raw.shape[0]
    scale = torch.ones(rows, 1) if scale is None else check_scale(raw, scale).reshape(-1, 1).expand(rows, 1)
    return Float8Tensor(raw, scale.contiguous(), block_size=[1, raw.shape[1]], dtype=dtype)


def torchao_config(kind: str) -> Any:
    """torchao's settings for weights of that kind.

    Raises:
        ValueError: unknown kind, or torchao is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"weights in '{kind}' are unknown; use one of {', '.join(KINDS)}")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(f"weights in {kind} need torchao: pip install torchao") from error
    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def quantize_linear(layer: nn.Linear, config: Any) -> None:
    """One layer's weight in place, by torchao's settings."""
    from torchao.quantization import quantize_

    quantize_(layer, config, filter_fn=lambda module, _name: module is layer)


def block_linears(dit: DiffusionTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """Name and layer of what is quantised."""
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and is_block_weight(f"{name}.weight", tuple(module.weight.shape)):
            yield name, module


def is_block_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the DiT is one that is quantised."""
    # Modulation is small, runs in fp32 and steers everything.
    inside = "transformer_blocks." in name and "modulation" not in name
    return inside and name.endswith(".weight") and len(shape) == 2
