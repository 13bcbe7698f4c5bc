"""From a path to tensors: single files, shards with an index, and folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from . import keys, kinds
from .container import TensorRecord, WeightsError, read_header

INDEX_SUFFIX = ".safetensors.index.json"
_SUBFOLDERS = {"dit": ("transformer", "model"), "vae": ("vae",), None: ("transformer", "model", "vae")}


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where the tensors of one model lie."""

    path: Path
    """What the user named."""
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorRecord]
    """Name in the file -> where it is."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder_config: Mapping[str, Any] | None = None
    """config.json beside the weights, if there is one."""
    sharded: bool = False


def open_source(path: str | Path, *, want: str | None = None) -> WeightsSource:
    """Find and read the headers of the weights at `path`; no tensor is read.

    Args:
        path: a .safetensors file, an index file, a folder with one of them, or a pipeline folder.
        want: 'dit' or 'vae' where a folder may hold both.

    Raises:
        WeightsError: nothing usable is there; says what is and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; expected .safetensors weights")
    if path.is_dir():
        return _from_folder(path, path, want)
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path, path)
    return _from_file(path, path)


def _from_folder(named: Path, folder: Path, want: str | None) -> WeightsSource:
    for name in _SUBFOLDERS[want]:
        if (folder / name).is_dir() and any((folder / name).glob("*.safetensors*")):
            return _from_folder(named, folder / name, want)
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    if indices:
        return _from_index(named, _preferred(folder, indices, INDEX_SUFFIX))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(item.name for item in folder.iterdir())[:5]
        raise WeightsError(f"{folder}: no .safetensors file in this folder (it holds {', '.join(others) or 'nothing'})")
    if len(files) > 1:
        # Folders such as the embedded models' keep one file for each part of the pipeline.
        fitting = [file for file in files if _fits(file, want)]
        return _from_file(named, _preferred(folder, fitting or files, ".safetensors"))
    return _from_file(named, files[0])


def _preferred(folder: Path, files: list[Path], suffix: str) -> Path:
    plain = [file for file in files if file.name == "diffusion_pytorch_model" + suffix]
    if len(files) > 1 and not plain:
        names = ", ".join(file.name for file in files[:5])
        raise WeightsError(f"{folder}: {len(files)} candidates ({names}); name one of them")
    return (plain or files)[0]


def _fits(file: Path, want: str | None) -> bool:
    wanted = kinds.VAE_KINDS if want == "vae" else (kinds.DIT,)
    parts = keys.split_prefixes(read_header(file)[0])
    return any(kinds.kind_of(set(names)) in wanted for names in parts.values())


def _from_file(named: Path, file: Path) -> WeightsSource:
    tensors, metadata = read_header(file)
    return WeightsSource(
        path=named, files=(file,), tensors=tensors, metadata=metadata, folder_config=_folder_config(file.parent)
    )


def _from_index(named: Path, index: Path) -> WeightsSource:
    weight_map = _read_index(index)
    tensors: dict[str, TensorRecord] = {}
    metadata: dict[str, str] = {}
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file}: shard is missing; {index.name} names it; get it again")
        records, shard_metadata = read_header(file)
        wanted = {name for name, shard in weight_map.items() if shard == file.name}
        if wanted != set(records):
            odd = sorted(wanted ^ set(records))
            raise WeightsError(
                f"{file}: its tensors are not those that {index.name} lists for it "
                f"({len(odd)} differ, such as {odd[0]}); shards of two models are mixed"
            )
        tensors.update(records)
        metadata.update(shard_metadata)
    config = _folder_config(index.parent)
    return WeightsSource(
        path=named, files=files, tensors=tensors, metadata=metadata, folder_config=config, sharded=True
    )


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: has no 'weight_map'; expected a safetensors index")
    for name in set(map(str, weight_map.values())):
        # Nothing outside the folder may be opened, whatever system the index was written on.
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name in ("", "..", "."):
            raise WeightsError(f"{index}: names the shard '{name}', which is not a file of its own folder")
    return weight_map


def _folder_config(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        WeightsError: it is not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values
