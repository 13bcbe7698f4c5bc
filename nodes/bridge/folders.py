"""What the loaders' drop-downs hold: ComfyUI's model folders, and the models that are built in."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...kandinsky5_core.config import VARIANTS
from ...kandinsky5_core.loading import NANO_FOLDER, ModelFiles, find_files

BUILT_IN = "built-in: "
AUTO = "auto"
NANO = tuple(name for name in VARIANTS if name.startswith("nano-"))


def choices(folder: str) -> list[str]:
    """Built-in models first, then the files of a ComfyUI model folder."""
    return [*(BUILT_IN + name for name in NANO), *folder_paths.get_filename_list(folder)]


def variant_choices() -> list[str]:
    """'auto' and every row of the table of checkpoints."""
    return [AUTO, *VARIANTS]


def built_in(choice: str) -> ModelFiles | None:
    """The files of a built-in model; None where the choice is a file."""
    name = choice.removeprefix(BUILT_IN)
    return find_files(name) if choice.startswith(BUILT_IN) and name in NANO else None


def path_of(folder: str, choice: str) -> Path:
    """The file that a drop-down's entry names; entries that are not in its folder are refused.

    Raises:
        ValueError: no such file below ComfyUI's folder.
    """
    path = folder_paths.get_full_path(folder, choice)
    if path is None or choice not in folder_paths.get_filename_list(folder):
        raise ValueError(f"'{choice}' is not in ComfyUI's models/{folder}; put the file there and press R to refresh")
    return Path(path)


__all__ = ["AUTO", "BUILT_IN", "NANO", "NANO_FOLDER", "built_in", "choices", "path_of", "variant_choices"]
