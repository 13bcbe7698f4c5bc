"""Eight bits in files: fp8 weights with a scale beside each (`scale_weight`, `weight_scale`), or plainly cast without
one, and ComfyUI's int8 with scales (`int8_tensorwise`)."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from .container import CAST_SPAN, MappedFile, TensorRecord, WeightsError

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
SCALED = (*FP8, "I8")
"""Dtypes of weights that are times a scale."""
SCALES = (".scale_weight", ".weight_scale")
IGNORED = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant", ".position_ids", ".inv_freq")
"""Ends of names that no weight has: activation scales and marks, and buffers that the model computes itself."""


def split_scales(
    records: Mapping[str, TensorRecord],
) -> tuple[dict[str, TensorRecord], dict[str, TensorRecord]]:
    """(weights, weight name -> its scale), without names that are ignored.

    Raises:
        WeightsError: a tensor is quantised in another way than scaled fp8 or int8.
    """
    scales = {
        name.removesuffix(end) + ".weight": record
        for name, record in records.items()
        for end in SCALES
        if name.endswith(end)
    }
    _check_marks(records)
    weights = {name: record for name, record in records.items() if not name.endswith(SCALES + IGNORED)}
    for name, record in weights.items():
        # Without a scale int8 means nothing.
        if record.dtype not in FLOATS + FP8 and (record.dtype not in SCALED or name not in scales):
            raise WeightsError(f"tensor '{name}' is {record.dtype}; expected fp32, fp16, bf16 or scaled fp8")
    for name in scales:
        if name not in weights or weights[name].dtype not in SCALED:
            raise WeightsError(f"there is a scale for '{name}', which is not an fp8 tensor of the file; get it again")
    return weights, scales


def _check_marks(records: Mapping[str, TensorRecord]) -> None:
    marks = {name: record for name, record in records.items() if name.endswith(".comfy_quant")}
    for name, record in marks.items():
        if record.file is None:
            continue  # only shapes are known
        mark = MappedFile(record.file, CAST_SPAN).flat(record)
        text = bytes(mark.tolist()).decode("utf-8", "replace")
        try:
            told = json.loads(text)
            form = told.get("format")
            rotated = told.get("convrot") or told.get("params", {}).get("convrot")
        except (ValueError, AttributeError):
            form, rotated = text, False
        if form not in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise") or rotated:
            form = f"{form} with rotated rows (convrot)" if rotated else form
            raise WeightsError(f"'{name}' says the weights are {form}; expected float8_e4m3fn, fp16 or bf16")


def dequantize(raw: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """fp8 or int8 weights (out, in) times a scale of one value or one a row, in `dtype`; without a scale just cast.

    Raises:
        WeightsError: the scale has another shape, as block-wise formats have.
    """
    if scale is None:
        return raw.to(dtype)
    scale = check_scale(raw, scale)
    rows = scale.reshape(-1, *[1] * (raw.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    return (raw.float() * rows).to(dtype)


def check_scale(raw: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale`, where it is one value or one a row of `raw`.

    Raises:
        WeightsError: it has another shape, as block-wise formats have.
    """
    if scale.numel() not in (1, raw.shape[0]):
        raise WeightsError(f"a scale of shape {tuple(scale.shape)} for weights {tuple(raw.shape)}; expected 1 or a row")
    return scale
