"""Files that nodes write into ComfyUI's model folders, and files they are given by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_api.latest import io

from ...kandinsky5_core.weights.container import read_header
from .folders import built_in, choices, files, path_of

FileName = io.AnyType
"""The name of a file. ComfyUI lets no text into the drop-downs of its older loaders, but anything of any type."""
NONE = "none"
NEW, REPLACE, KEEP = "new name", "replace", "keep"
EXISTING = (NEW, REPLACE, KEEP)
FOLDERS = ("loras", "diffusion_models")
_ODD = re.compile(r'[\x00-\x1f<>:"|?*]')


@dataclass(frozen=True)
class Result:
    """A file that a node will write."""

    path: Path
    name: str
    """As the drop-downs of its folder name it."""
    kept: bool = False
    """It is there and stays: nothing is to be made."""


def result_file(folder: str, name: str, existing: str = NEW) -> Result:
    """Where a result of this name goes, below ComfyUI's folder of a kind of model.

    Args:
        name: With or without `.safetensors`; may have subfolders, which are made.
        existing: Where there is such a file: 'new name' takes the first free of name-2, name-3 ..., 'replace' writes
            over it once the new one is complete, 'keep' leaves it as it is.

    Raises:
        ValueError: the name is empty, has odd characters, or leads out of the folder.
    """
    root = model_root(folder).resolve()
    target = (root / check_name(name)).resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"name '{name}' leads out of ComfyUI's models/{folder}; give a name inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = target.exists() and existing == KEEP
    number = 2
    base = target.name.removesuffix(".safetensors")
    while existing == NEW and target.exists():
        target = target.with_name(f"{base}-{number}.safetensors")
        number += 1
    return Result(target, str(target.relative_to(root)), kept)


def check_name(name: str) -> PurePosixPath:
    """A relative path ending in `.safetensors`.

    Raises:
        ValueError: no such name.
    """
    path = PurePosixPath(name.strip().replace("\\", "/"))
    wrong = any(part.startswith(".") or part.endswith((" ", ".")) for part in path.parts)
    if not path.parts or path.is_absolute() or wrong or _ODD.search(name) or len(name) > 200:
        raise ValueError(f"name '{name}' is no name for a file, such as soup or mine/soup")
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def model_root(folder: str) -> Path:
    """The folder of that name among those ComfyUI reads; the first where none is called so."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    return next((path for path in paths if path.name == folder), paths[0])


def model_path(choice: str) -> Path:
    """The DiT of an entry of `choices('diffusion_models')`, built in or a file."""
    found = built_in(choice)
    return path_of("diffusion_models", choice) if found is None else found.dit


def part_choices() -> list[str]:
    """'none', then every LoRA and model with its folder."""
    return [NONE, *(f"{folder}/{name}" for folder in FOLDERS for name in files(folder))]


def tree_choices() -> list[str]:
    """Every subfolder of models/loras and models/diffusion_models that holds weights, with its folder."""
    found = set()
    for folder in FOLDERS:
        for name in files(folder):
            parts = Path(name).parts[:-1]
            found |= {"/".join((folder, *parts[:depth])) for depth in range(1, len(parts) + 1)}
    return sorted(found)


def part_path(given: str) -> Path:
    """The file that a part of a soup names: `loras/...`, `diffusion_models/...`, a name in either, or a whole path.

    Raises:
        ValueError: no such file in ComfyUI's model or output folders, or the name is in both.
    """
    given = given.strip()
    if Path(given).is_absolute():
        return _allowed(Path(given))
    for folder in FOLDERS:
        if given.startswith(f"{folder}/"):
            return path_of(folder, given.removeprefix(f"{folder}/"))
    found = [folder for folder in FOLDERS if given in files(folder)]
    if len(found) > 1:
        raise ValueError(f"'{given}' is in models/loras and in models/diffusion_models; say which: loras/{given}")
    if not found:
        raise ValueError(f"'{given}' is neither in ComfyUI's models/loras nor in models/diffusion_models")
    return path_of(found[0], given)


def tree_path(choice: str) -> Path:
    """The folder that an entry of `tree_choices` names.

    Raises:
        ValueError: there is none.
    """
    if choice not in tree_choices():
        raise ValueError(f"'{choice}' is no folder with weights below models/loras or models/diffusion_models")
    folder, _, below = choice.partition("/")
    roots = [Path(root) for root in folder_paths.get_folder_paths(folder)]
    return next(root / below for root in roots if (root / below).is_dir())


def _allowed(path: Path) -> Path:
    roots = [folder_paths.get_output_directory(), *(p for folder in FOLDERS for p in folder_paths.get_folder_paths(folder))]
    inside = any(path.resolve().is_relative_to(Path(root).resolve()) for root in roots)
    if not inside or path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"'{path.name}' is no .safetensors file in ComfyUI's model or output folders")
    return path


def metadata_of(path: Path) -> dict[str, str]:
    """Of a safetensors file."""
    return read_header(path)[1]


def stamp(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file is written anew under the same name; files that are not there are left out."""
    found = []
    for path in paths:
        if path.exists():
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)


def name_input(default: str, folder: str) -> list[io.Input]:
    """The inputs for the name of a result."""
    return [
        io.String.Input(
            "name", default=default, tooltip=f"Of the new file in models/{folder}; may have subfolders, as in mine/{default}."
        ),
        io.Combo.Input(
            "existing",
            options=list(EXISTING),
            default=NEW,
            optional=True,
            advanced=True,
            tooltip="Where the file is there already: new name takes name-2 and so on; replace writes over it; keep uses "
            "it as it is and makes nothing.",
        ),
    ]


def base_input() -> io.Input:
    """A model to start from."""
    return io.Combo.Input(
        "base",
        options=choices("diffusion_models"),
        tooltip="The model below the LoRA: a file of models/diffusion_models, or a built-in one.",
    )


def lora_input() -> io.Input:
    """A LoRA file."""
    return io.Combo.Input(
        "lora", options=files("loras"), tooltip="A file of models/loras with official, diffusers, ComfyUI or kohya keys."
    )
