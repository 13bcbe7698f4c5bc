"""Models from files: built without storage, filled tensor by tensor.

Weights that keep their dtype on the CPU are used in place in the mapped file; others are cast or moved in pieces of
a few megabytes. Either way the peak is the weights in the target dtype and little more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType

import torch

from . import kinds
from .container import CAST_SPAN, DTYPES, LOADABLE, MAP_SPAN, MappedFile, TensorRecord, WeightsError
from .detect import Identified, WeightsInfo, check_tensors, identify
from .modules import build_on_meta, module_for
from .scaled_fp8 import SCALED, dequantize
from .source import open_source


def load_dit(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ops: ModuleType = torch.nn,
) -> tuple[torch.nn.Module, WeightsInfo]:
    """A `DiffusionTransformer` from any layout, and what the file is.

    Args:
        path: file, index, model folder or pipeline folder.
        dtype: of the weights in memory; None keeps the file's, and makes bf16 of fp8.
        ops: layer factory.

    Raises:
        WeightsError: the weights are not those of a whole Kandinsky 5 DiT.
    """
    return _load(path, "dit", dtype=dtype, device=device, ops=ops)


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ops: ModuleType = torch.nn,
) -> tuple[torch.nn.Module, WeightsInfo]:
    """A `HunyuanVAE` or `FluxVAE`, whichever the file is; see `load_dit`."""
    return _load(path, "vae", dtype=dtype, device=device, ops=ops)


def load_state_into(
    build: Callable[[], torch.nn.Module],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keymap: Callable[[str], str | None] | None = None,
) -> torch.nn.Module:
    """The module that `build` makes, with the tensors of any safetensors file or folder.

    Args:
        build: makes the module; called so that its parameters get no storage.
        keymap: name in the file -> name in the module, None to leave a tensor out; default the same name.

    Raises:
        WeightsError: names or shapes differ from the module's; found before any tensor is read.
    """
    source = open_source(path)
    pairs = [(keymap(name) if keymap else name, record) for name, record in source.tensors.items()]
    try:
        return fill_module(build, {name: record for name, record in pairs if name}, dtype=dtype, device=device)
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from error


def fill_module(
    build: Callable[[], torch.nn.Module],
    records: Mapping[str, TensorRecord],
    *,
    scales: Mapping[str, TensorRecord] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> torch.nn.Module:
    """The module that `build` makes, with the tensors at `records` (by the module's names) as its weights.

    Args:
        scales: Of fp8 and int8 weights, by the weights' names; None refuses both.

    Raises:
        WeightsError: names or shapes differ from the module's, or a dtype cannot be loaded.
    """
    module = build_on_meta(build)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors({name: record.shape for name, record in records.items()}, expected)
    check_dtypes(records, LOADABLE if scales is None else (*LOADABLE, *SCALED))
    module.load_state_dict(read_weights(records, scales or {}, dtype=dtype, device=device), assign=True)
    _settle_buffers(module, device)
    return module


def read_weights(
    records: Mapping[str, TensorRecord],
    scales: Mapping[str, TensorRecord],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """`read_tensors`, with fp8 and int8 weights times their scales in fp32, in `dtype` (None: bfloat16)."""
    small = {name: record for name, record in records.items() if record.dtype in SCALED}
    plain = {name: record for name, record in records.items() if name not in small}
    state = read_tensors(plain, dtype=dtype, device=device)
    factors = read_tensors(scales, dtype=torch.float32, device=device)
    for name, record in small.items():
        # One at a time, so that only one original lies beside the weights in the target dtype.
        raw = read_tensors({name: record}, device=device)[name]
        state[name] = dequantize(raw, factors.get(name), dtype or torch.bfloat16)
    return state


def read_tensors(
    records: Mapping[str, TensorRecord], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Name -> tensor in `dtype` (None: as stored) on `device`."""
    device = torch.device(device)
    files: dict[tuple[Path, int], MappedFile] = {}
    tensors = {}
    for name, record in sorted(records.items(), key=lambda item: (item[1].file, item[1].begin)):
        in_place = device.type == "cpu" and dtype in (None, DTYPES[record.dtype][1])
        span = MAP_SPAN if in_place else CAST_SPAN
        file = files.setdefault((record.file, span), MappedFile(record.file, span))
        tensors[name] = file.flat(record).view(record.shape) if in_place else _cast(file, record, dtype, device)
    return tensors


def check_dtypes(records: Mapping[str, TensorRecord], known: Collection[str] = LOADABLE) -> None:
    """Refuse dtypes that weights are not kept in.

    Raises:
        WeightsError: names the first such tensor.
    """
    for name, record in records.items():
        if record.dtype not in known:
            raise WeightsError(
                f"tensor '{name}' is {DTYPES[record.dtype][0]}; expected fp32, fp16 or bf16 weights, not quantised ones"
            )


def _cast(file: MappedFile, record: TensorRecord, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    target = torch.empty(record.numel, dtype=dtype or DTYPES[record.dtype][1], device=device)
    for first, piece in file.pieces(record):
        target[first : first + piece.numel()].copy_(piece)
    return target.view(record.shape)


def _settle_buffers(module: torch.nn.Module, device: torch.device | str) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"buffer {name} of {type(part).__name__} is made by torch.empty"
                part._buffers[name] = buffer.to(device)


def _load(
    path: str | Path, want: str, *, dtype: torch.dtype | None, device: torch.device | str, ops: ModuleType
) -> tuple[torch.nn.Module, WeightsInfo]:
    found = identify_wanted(path, want)
    config = found.info.config
    try:
        module = fill_module(
            lambda: module_for(config, ops), found.records, scales=found.scales, dtype=dtype, device=device
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return module, found.info


def identify_wanted(path: str | Path, want: str) -> Identified:
    """The DiT or VAE at `path`.

    Raises:
        WeightsError: something else is there; says what.
    """
    found = identify(open_source(path, want=want), want=want)
    wanted = (kinds.DIT,) if want == "dit" else kinds.VAE_KINDS
    if found.info.kind not in wanted:
        expected = " or ".join(kinds.WORDS[kind] for kind in wanted)
        raise WeightsError(f"{path}: looks like {found.info.looks_like}; expected {expected}")
    return found
