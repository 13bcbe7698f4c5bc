"""Filling transformers models from safetensors files: names by anchors, fp8 with scales, no second copy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ..weights import kinds
from ..weights.container import TensorRecord, WeightsError
from ..weights.detect import check_tensors
from ..weights.load import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale")
IGNORED = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant", ".position_ids", ".inv_freq")
"""Ends of names that no weight has: fp8 activation scales and marks, and buffers that the model computes itself."""


def find_prefix(names: Iterable[str], anchor: str) -> str | None:
    """What precedes `anchor` in the name that ends with it, or None.

    Raises:
        WeightsError: several names end with it, so the file holds more than one such model.
    """
    found = [name[: -len(anchor)] for name in names if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise WeightsError(f"{len(found)} tensors are called {anchor} ({', '.join(found)}); expected one model a file")
    return found[0] if found else None


def under(tensors: Mapping[str, TensorRecord], prefix: str, new: str = "") -> dict[str, TensorRecord]:
    """The tensors whose names start with `prefix`, with `new` in its place."""
    return {new + name[len(prefix) :]: record for name, record in tensors.items() if name.startswith(prefix)}


def shape_of(tensors: Mapping[str, TensorRecord], name: str) -> tuple[int, ...]:
    """Shape of a tensor that sizes are deduced from.

    Raises:
        WeightsError: the file has no such tensor.
    """
    if name not in tensors:
        raise WeightsError(f"tensor '{name}' is missing; the file is incomplete, or {looks_like(tensors)}")
    return tensors[name].shape


def count_layers(tensors: Mapping[str, TensorRecord], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def looks_like(names: Mapping[str, TensorRecord]) -> str:
    """In words, what a file with these names is."""
    return kinds.looks_like(set(names))


def fill_transformer(
    model: PreTrainedModel,
    records: Mapping[str, TensorRecord],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> PreTrainedModel:
    """`model`, made inside `build_on_meta`, with these weights; frozen, in eval mode.

    Weights that keep their dtype on the CPU stay in the mapped file. fp8 weights become `dtype` (bfloat16 if None),
    each times its scale in fp32.

    Raises:
        WeightsError: names, shapes or dtypes are not those of the model.
    """
    weights, scales = split_scales(records)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors({name: record.shape for name, record in weights.items()}, expected)
    state = _read(weights, scales, dtype, device)
    model.load_state_dict(state, assign=True)
    _move_buffers(model, device)
    return model.requires_grad_(False).eval()


def split_scales(
    records: Mapping[str, TensorRecord],
) -> tuple[dict[str, TensorRecord], dict[str, TensorRecord]]:
    """(weights, weight name -> its fp8 scale), without names that are ignored.

    Raises:
        WeightsError: a tensor is quantised in another way than scaled fp8.
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
        if record.dtype not in FLOATS + FP8:
            raise WeightsError(f"tensor '{name}' is {record.dtype}; expected fp32, fp16, bf16 or scaled fp8")
    for name in scales:
        if name not in weights or weights[name].dtype not in FP8:
            raise WeightsError(f"there is a scale for '{name}', which is not an fp8 tensor of the file; get it again")
    return weights, scales


def _check_marks(records: Mapping[str, TensorRecord]) -> None:
    marks = {name: record for name, record in records.items() if name.endswith(".comfy_quant")}
    for name, mark in read_tensors(marks).items():
        text = bytes(mark.flatten().tolist()).decode("utf-8", "replace")
        try:
            form = json.loads(text).get("format")
        except (ValueError, AttributeError):
            form = text
        if form not in ("float8_e4m3fn", "float8_e5m2"):
            raise WeightsError(f"'{name}' says the weights are {form}; expected float8_e4m3fn, fp16 or bf16")


def _read(
    weights: Mapping[str, TensorRecord],
    scales: Mapping[str, TensorRecord],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    fp8 = {name: record for name, record in weights.items() if record.dtype in FP8}
    plain = {name: record for name, record in weights.items() if name not in fp8}
    state = read_tensors(plain, dtype=dtype, device=device)
    factors = read_tensors(scales, dtype=torch.float32, device=device)
    for name, record in fp8.items():
        # One at a time, so that only one fp8 original lies beside the weights in the target dtype.
        raw = read_tensors({name: record}, device=device)[name]
        state[name] = dequantize(raw, factors.get(name), dtype or torch.bfloat16)
    return state


def dequantize(raw: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """fp8 weights (out, in) times a scale of one value or one a row, in `dtype`; without a scale just cast.

    Raises:
        WeightsError: the scale has another shape, as block-wise formats have.
    """
    if scale is None:
        return raw.to(dtype)
    if scale.numel() not in (1, raw.shape[0]):
        raise WeightsError(f"a scale of shape {tuple(scale.shape)} for weights {tuple(raw.shape)}; expected 1 or a row")
    rows = scale.reshape(-1, *[1] * (raw.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    return (raw.float() * rows).to(dtype)


def _move_buffers(model: torch.nn.Module, device: torch.device | str) -> None:
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"buffer {name} of {type(part).__name__} was never computed"
                part._buffers[name] = buffer.to(device)
