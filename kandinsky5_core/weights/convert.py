"""Rewriting weights in another layout or dtype, a few megabytes in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..config import DiTConfig, VAEConfig
from . import kinds
from .container import CAST_SPAN, DTYPES, MappedFile, TensorRecord, WeightsError
from .deduce import CONFIG_KEY
from .detect import Identified, WeightsInfo, identify
from .diffusers_config import diffusers_config
from .keys import attention_as_convolution, vae_to_single
from .load import check_dtypes
from .source import INDEX_SUFFIX, WeightsSource, open_source
from .variants import VARIANT_KEY

LAYOUTS = {
    kinds.DIT: ("official", "diffusers", "comfyui"),
    kinds.HUNYUAN_VAE: ("diffusers", "tencent", "comfyui"),
    kinds.FLUX_VAE: ("diffusers", "bfl"),
}
"""Kind -> layouts it is written in: 'diffusers' is a folder with config.json, the others are single files.
'tencent' has the names of 'diffusers'; 'bfl' is also what ComfyUI reads."""
COMFYUI_PREFIX = "model.diffusion_model."
_STEM = "diffusion_pytorch_model"
_SPARE_BYTES = 1 << 20
OnProgress = Callable[[int, int], None]


class _Planned(NamedTuple):
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    record: TensorRecord

    @property
    def nbytes(self) -> int:
        return self.record.numel * DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True, kw_only=True)
class _Plan:
    tensors: list[_Planned]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    """config.json of a folder; None for a single file."""
    shard_size: int | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str,
    dtype: torch.dtype | None = None,
    shard_size: int | None = None,
    want: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write the DiT or VAE at `source` to `target` in another layout. Nothing half-written stays behind.

    Args:
        source: anything `inspect_file` takes.
        target: a .safetensors file, or for 'diffusers' a folder, which must be new or empty.
        layout: one of `LAYOUTS` for this kind of model.
        dtype: torch.float32, float16 or bfloat16; None keeps the stored one.
        shard_size: bytes of tensors a file of a folder may hold; None writes one file.
        want: 'dit' or 'vae' where the source holds both.
        overwrite: replace an existing single file (never the source).
        on_progress: called with (bytes written, bytes in all).

    Raises:
        WeightsError: the source is not usable, the target is not allowed, or the disk has too little space.
    """
    source, target = Path(source), Path(target)
    opened = open_source(source, want=want)
    found = identify(opened, want=want)
    plan = _plan(found, opened, layout, dtype, shard_size)
    _check_target(opened, target, plan, overwrite)
    progress = _Progress(on_progress, plan.nbytes)
    if plan.config is None:
        _write_file_aside(target, plan, progress)
    else:
        _write_folder_aside(target, plan, progress)
    return target


def _plan(
    found: Identified, source: WeightsSource, layout: str, dtype: torch.dtype | None, shard_size: int | None
) -> _Plan:
    info = found.info
    if info.kind not in LAYOUTS:
        raise WeightsError(f"{source.path}: looks like {info.looks_like}; only DiTs and VAEs are converted")
    if layout not in LAYOUTS[info.kind]:
        raise WeightsError(
            f"layout '{layout}' does not exist for {info.looks_like}; use {', '.join(LAYOUTS[info.kind])}"
        )
    if shard_size is not None and (layout != "diffusers" or shard_size < 1):
        raise WeightsError(f"shard_size {shard_size} needs layout 'diffusers' and a positive number of bytes")
    check_dtypes(found.records)
    code = _dtype_code(dtype)
    tensors = [
        _Planned(*_renamed(name, record, info, layout), code or record.dtype, record)
        for name, record in sorted(found.records.items(), key=lambda item: (item[1].file, item[1].begin))
    ]
    # Wider types first, so that every tensor is aligned to its own size.
    tensors.sort(key=lambda tensor: -DTYPES[tensor.dtype][1].itemsize)
    config = diffusers_config(info, source.folder_config) if layout == "diffusers" else None
    return _Plan(tensors=tensors, metadata=_metadata(info), config=config, shard_size=shard_size)


def _dtype_code(dtype: torch.dtype | None) -> str | None:
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", None: None}
    if dtype not in codes:
        raise WeightsError(f"dtype {dtype} is not written; use float32, float16, bfloat16")
    return codes[dtype]


def _renamed(name: str, record: TensorRecord, info: WeightsInfo, layout: str) -> tuple[str, tuple[int, ...]]:
    if isinstance(info.config, DiTConfig):
        return (COMFYUI_PREFIX if layout == "comfyui" else "") + name, record.shape
    assert isinstance(info.config, VAEConfig)
    if layout in ("diffusers", "tencent"):
        return name, record.shape
    shape = attention_as_convolution(name, record.shape, 3 if info.kind == kinds.HUNYUAN_VAE else 2)
    return vae_to_single(name, len(info.config.block_out_channels)), shape


def _metadata(info: WeightsInfo) -> dict[str, str]:
    metadata = {**info.metadata, "format": "pt", CONFIG_KEY: json.dumps(asdict(info.config))}
    if info.variant and info.variant_certain:
        metadata[VARIANT_KEY] = info.variant
    return metadata | {"kandinsky5.converted_from": info.layout}


def _check_target(source: WeightsSource, target: Path, plan: _Plan, overwrite: bool) -> None:
    folder = plan.config is not None
    if not folder and target.suffix != ".safetensors":
        raise WeightsError(f"target {target}: this layout is one file; give it a name that ends in .safetensors")
    if folder and target.suffix == ".safetensors":
        raise WeightsError(f"target {target}: layout 'diffusers' is a folder; give a folder's name")
    real = target.resolve()
    inputs = [source.path.resolve(), *[file.resolve() for file in source.files]]
    if any(real == item or real in item.parents for item in inputs):
        raise WeightsError(f"target {target} is the source or holds it; choose another name")
    if source.path.is_dir() and source.path.resolve() in real.parents:
        raise WeightsError(f"target {target} lies inside the source folder; choose another place")
    # A folder is never replaced: what else lies in it is not ours to delete.
    if target.is_dir() and (not folder or any(target.iterdir())):
        raise WeightsError(f"target {target} is a folder with something in it; choose another name")
    if target.is_file() and (folder or not overwrite):
        raise WeightsError(f"target {target} exists; choose another name, or overwrite=True for a single file")
    if not real.parent.is_dir():
        raise WeightsError(f"target {target}: its folder does not exist; make it first")
    free = shutil.disk_usage(real.parent).free
    if free < plan.nbytes + _SPARE_BYTES:
        needed = f"{plan.nbytes / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free"
        raise WeightsError(f"target {target} needs {needed}")


class _Progress:
    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self.on_progress, self.total, self.done = on_progress, total, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.on_progress:
            self.on_progress(self.done, self.total)


def _write_file_aside(target: Path, plan: _Plan, progress: _Progress) -> None:
    aside = _aside(target)
    try:
        with aside.open("xb") as file:
            _write_tensors(file, plan.tensors, plan.metadata, progress)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _write_folder_aside(target: Path, plan: _Plan, progress: _Progress) -> None:
    aside = _aside(target)
    try:
        aside.mkdir()
        _write_folder(aside, plan, progress)
        if target.is_dir():
            target.rmdir()
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"


def _write_folder(folder: Path, plan: _Plan, progress: _Progress) -> None:
    shards = _shards(plan.tensors, plan.shard_size)
    names = [f"{_STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [_STEM + ".safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_tensors(file, tensors, plan.metadata, progress)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / (_STEM + INDEX_SUFFIX), index)
    _write_json(folder / "config.json", plan.config)


def _shards(tensors: list[_Planned], shard_size: int | None) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_size is not None and shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_tensors(file: BinaryIO, tensors: list[_Planned], metadata: Mapping[str, str], progress: _Progress) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in tensors:
        for _, piece in MappedFile(tensor.record.file, CAST_SPAN).pieces(tensor.record):
            data = piece.to(DTYPES[tensor.dtype][1]).view(torch.uint8).numpy()
            file.write(data.data)
            progress.add(data.nbytes)
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, values: Mapping[str, Any] | None) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
