"""What the loaders' drop-downs hold: ComfyUI's model folders, and the models that are built in."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

from ...kandinsky5_core.config import VARIANTS, Variant, variant
from ...kandinsky5_core.loading import ModelFiles, find_files
from ...kandinsky5_core.weights.detect import inspect_file

BUILT_IN = "built-in: "
AUTO = "auto"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
NANO = tuple(name for name in VARIANTS if name.startswith("nano-"))


def choices(folder: str) -> list[str]:
    """Built-in models first, then what a ComfyUI model folder holds: single files, and one entry for a sharded model."""
    return [*(BUILT_IN + name for name in NANO), *files(folder)]


def files(folder: str) -> list[str]:
    """Safetensors of a model folder; not the shards of a model, which its index stands for, and no pickles."""
    names = folder_paths.get_filename_list(folder)
    single = [name for name in names if name.endswith(".safetensors") and not SHARD.search(name)]
    return sorted({*single, *_indexes(folder)})


def _indexes(folder: str) -> list[str]:
    found = []
    for base in folder_paths.get_folder_paths(folder):
        root = Path(base)
        found += [str(path.relative_to(root)) for path in root.glob("**/*.safetensors.index.json")]
    return found


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
    if path is None or choice not in files(folder):
        raise ValueError(f"'{choice}' is not in ComfyUI's models/{folder}; put the file there and press R to refresh")
    return Path(path)


def pick_variant(path: Path, chosen: str) -> Variant:
    """The row that the user named, else the one that the file is found to be.

    Raises:
        ValueError: the file is no Kandinsky 5 DiT, or has sizes of no released one.
    """
    if chosen != AUTO:
        return variant(chosen)
    info = inspect_file(path, want="dit")
    if info.kind != "dit":
        raise ValueError(f"model_name '{path.name}' looks like {info.looks_like}; choose a Kandinsky 5 diffusion model")
    if info.variant is None:
        raise ValueError(f"model_name '{path.name}' has sizes of no released variant; choose one under 'variant'")
    return variant(info.variant)


def doubt(path: Path, chosen: str) -> str:
    """What else the file may be, where its row was guessed; '' where it is sure."""
    if chosen != AUTO:
        return ""
    info = inspect_file(path, want="dit")
    others = [name for name in info.variants if name != info.variant]
    if info.variant_certain or not others:
        return ""
    return (
        f"guessed ({info.variant_reason}); it may also be {', '.join(others)}, with other steps, guidance or shift: "
        "choose under 'variant', or give the file its released name"
    )


USUAL = {
    "text_encoder": ("text_encoders", ("qwen_2.5_vl_7b", "qwen2.5_vl_7b", "qwen2.5-vl-7b")),
    "clip_name": ("text_encoders", ("clip_l", "clip-l")),
    "hunyuan": ("vae", ("hunyuan_video_vae", "hunyuanvideo_vae")),
    "flux": ("vae", ("ae.", "flux_vae", "flux-vae")),
}
"""ComfyUI's folder and the beginnings of the usual file names of each part."""


def find_auto(model_name: str, **given: str) -> dict[str, str]:
    """`given` choices with every 'auto' replaced by the built-in part or the usual file.

    Raises:
        ValueError: no file of the usual name lies in its folder.
    """
    if built_in(model_name) is not None:
        return {part: model_name if choice == AUTO else choice for part, choice in given.items()}
    kind = None
    found = {}
    for part, choice in given.items():
        if part == "vae_name" and choice == AUTO:
            kind = pick_variant(path_of("diffusion_models", model_name), AUTO).vae.kind
        found[part] = _usual(part, kind or part) if choice == AUTO else choice
    return found


def _usual(part: str, key: str) -> str:
    folder, beginnings = USUAL[key]
    for name in files(folder):
        if Path(name).name.lower().startswith(beginnings):
            return name
    raise ValueError(
        f"{part} is 'auto' and models/{folder} has no file that begins with {' or '.join(beginnings)}; "
        "put it there or choose another file"
    )
