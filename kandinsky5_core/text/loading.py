"""Filling transformers models from safetensors files: names by anchors, fp8 with scales, no second copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ..memory.peak import give_back_freed
from ..weights import kinds
from ..weights.container import TensorRecord, WeightsError
from ..weights.detect import check_tensors
from ..weights.load import read_tensors, read_weights
from ..weights.scaled_fp8 import SCALED, split_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantise = Callable[[torch.nn.Linear], torch.nn.Module]
KeepStored = Callable[[torch.nn.Linear, torch.Tensor, torch.Tensor | None], torch.nn.Module]
"""What to put in the place of a linear layer that is fp8 or int8 in the file: given the layer with its bias, its weight
(out, in) as it is stored, and its scale, of one value or one a row, or None."""
LAYERS = "language_model.layers."
"""Below it lie the linear layers that may be quantised."""


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
    quantise: Quantise | None = None,
    keep_stored: KeepStored | None = None,
) -> PreTrainedModel:
    """`model`, made inside `build_on_meta`, with these weights; frozen, in eval mode.

    Weights that keep their dtype on the CPU stay in the mapped file. fp8 weights become `dtype` (bfloat16 if None),
    each times its scale in fp32.

    Args:
        quantise: What to put in the place of each linear layer below `LAYERS`, as soon as its weight is read, so that
            the wide weights are never in memory all at once.
        keep_stored: Takes linear layers that are fp8 or int8 in the file, anywhere but where `quantise` is at work.

    Raises:
        WeightsError: names, shapes or dtypes are not those of the model.
    """
    weights, scales = split_scales(records)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors({name: record.shape for name, record in weights.items()}, expected)
    later = [] if quantise is None else [f"{name}.weight" for name in _linears(model) if LAYERS in name]
    linears = [] if keep_stored is None else [f"{name}.weight" for name in _linears(model)]
    kept = [name for name in linears if name not in later and weights[name].dtype in SCALED]
    rest = {name: record for name, record in weights.items() if name not in (*later, *kept)}
    state = read_weights(rest, _of(scales, rest), dtype=dtype, device=device)
    model.load_state_dict(state, strict=not later and not kept, assign=True)
    _keep(model, _of(weights, kept), _of(scales, kept), keep_stored, device)
    for name in later:
        weight = read_weights({name: weights[name]}, _of(scales, [name]), dtype=dtype, device=device)[name]
        _replace(model, name.removesuffix(".weight"), weight, quantise)
        give_back_freed()  # the wide copies lie between the small ones that stay
    _move_buffers(model, device)
    return model.requires_grad_(False).eval()


def _linears(model: torch.nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]


def _of(records: Mapping[str, TensorRecord], names: Collection[str]) -> dict[str, TensorRecord]:
    return {name: record for name, record in records.items() if name in names}


def _keep(
    model: torch.nn.Module, weights: Mapping[str, TensorRecord], scales: Mapping[str, TensorRecord],
    keep_stored: KeepStored | None, device: torch.device | str,
) -> None:  # fmt: skip
    factors = read_tensors(scales, dtype=torch.float32, device=device)
    for name, raw in read_tensors(weights, device=device).items():
        layer = name.removesuffix(".weight")
        _put(model, layer, keep_stored(model.get_submodule(layer), raw, factors.get(name)))


def _replace(model: torch.nn.Module, name: str, weight: torch.Tensor, quantise: Quantise) -> None:
    layer = model.get_submodule(name)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    _put(model, name, quantise(layer))


def _put(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, layer)


def _move_buffers(model: torch.nn.Module, device: torch.device | str) -> None:
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"buffer {name} of {type(part).__name__} was never computed"
                part._buffers[name] = buffer.to(device)
