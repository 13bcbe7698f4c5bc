"""Training jobs in ComfyUI: where they lie, how they start, and how a node waits for one."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ...kandinsky5_core.media import read_image, read_video, write_image
from ...train.config import DataConfig, JobConfig, to_dict
from ...train.jobs import Job, Jobs, Status, launch
from .folders import built_in, path_of

PACK = Path(__file__).parents[2]
DATASETS = PACK / "workflows" / "datasets"
BUILT_IN_DATA = "built-in: "
FOLDER_KEY = "kandinsky5_datasets"
"""Name under which extra_model_paths.yaml may list more folders of training material."""
POLL_SECONDS = 0.5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")


def jobs_folder() -> Path:
    """`output/kandinsky5/jobs`."""
    return Path(folder_paths.get_output_directory()) / "kandinsky5" / "jobs"


def jobs() -> Jobs:
    """Every job of this ComfyUI."""
    return Jobs(jobs_folder())


def data_roots() -> list[Path]:
    """Folders below which training material may lie."""
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    if FOLDER_KEY in folder_paths.folder_names_and_paths:
        roots += folder_paths.get_folder_paths(FOLDER_KEY)
    return [Path(root) for root in roots]


def data_path(name: str) -> Path:
    """The folder or table that a dataset node names.

    Raises:
        ValueError: it is nowhere below the folders that may be read.
    """
    if name.startswith(BUILT_IN_DATA):
        path = DATASETS / name.removeprefix(BUILT_IN_DATA)
        if path.parent == DATASETS and path.is_dir():
            return path
    asked = Path(name.strip().strip('"'))
    for root in data_roots():
        path = root / asked
        if ".." not in asked.parts and path.is_relative_to(root) and path != root and path.exists():
            return path
    raise ValueError(
        f"training material '{name}' is not there; put the folder into ComfyUI's input folder and give its name, or list "
        f"its parent as '{FOLDER_KEY}' in extra_model_paths.yaml"
    )


def built_in_data() -> list[str]:
    """Names of the drawn datasets of this pack."""
    return [BUILT_IN_DATA + folder.name for folder in sorted(DATASETS.iterdir()) if folder.is_dir()]


def model_files(model_name: str, text_encoder: str, clip_name: str, vae_name: str) -> dict[str, str]:
    """Entries of the loaders' drop-downs as a job names files."""
    if built_in(model_name) is not None:
        return {"model": model_name.partition(": ")[2]}
    return {
        "model": str(path_of("diffusion_models", model_name)),
        "text_encoder": str(path_of("text_encoders", text_encoder)),
        "clip": str(path_of("text_encoders", clip_name)),
        "vae": str(path_of("vae", vae_name)),
        "tokenizers": str(Path(folder_paths.base_path)),
    }


def cached(data: DataConfig) -> DataConfig:
    """The same material, encoded into the one cache of this ComfyUI, which all jobs share."""
    return replace(data, cache=str(jobs_folder().parent / "cache"))


def model_name(path: Path | None) -> str:
    """What the loaders' drop-downs call a file of a model folder; its path where it lies elsewhere."""
    for folder in ("loras", "diffusion_models"):
        for root in map(Path, folder_paths.get_folder_paths(folder)):
            if path is not None and path.is_relative_to(root):
                return str(path.relative_to(root))
    return "" if path is None else str(path)


def keep_image(image: torch.Tensor) -> Path:
    """The first picture of an IMAGE as a file for jobs, named by its content."""
    pixels = (image[0, ..., :3] * 255).round().clamp(0, 255).byte()
    name = hashlib.sha256(pixels.numpy().tobytes() + str(tuple(pixels.shape)).encode()).hexdigest()[:16]
    path = jobs_folder().parent / "inputs" / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, pixels.float() / 255)
    return path


def check_name(name: str) -> str:
    """A name that may become part of a file's name.

    Raises:
        ValueError: it is empty or has other signs.
    """
    if not _NAME.fullmatch(name.strip()):
        raise ValueError(f"name '{name}' must begin with a letter or digit and hold letters, digits, space, . _ - alone")
    return name.strip()


def start(config: JobConfig, *, again: bool) -> Job:
    """Start a job, or go on with the one that has the same settings.

    Args:
        again: A new one even if there is one.
    """
    if not again:
        for job in jobs().all():
            if _same(job, config):
                return continued(job)
    job = jobs().create(config)
    free_memory(config.device)
    launch(job)
    return job


def continued(job: Job) -> Job:
    """The job, running again unless it is done."""
    status = job.status()
    if not status.running and status.state != "done":
        free_memory(job.config().device)
        launch(job)
    return job


def _same(job: Job, config: JobConfig) -> bool:
    try:
        return to_dict(job.config()) == to_dict(config)
    except ValueError:
        return False


def free_memory(device: str) -> None:
    """Give the accelerator to the job, unless it trains elsewhere."""
    if device == "cpu":
        return
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def wait(job: Job) -> Status:
    """Hold the worker until the job ends, which keeps others off the accelerator; move the bar and show samples.

    Cancel writes STOP and waits for the job to save.

    Raises:
        ValueError: the job failed.
    """
    free_memory(job.config().device)
    bar = comfy.utils.ProgressBar(1)
    shown = 0
    while (status := job.status()).running:
        try:
            comfy.model_management.throw_exception_if_processing_interrupted()
        except comfy.model_management.InterruptProcessingException:
            job.stop()
            _until_ended(job)
            raise
        samples = job.samples()
        preview = None
        if samples and samples[-1][0] > shown:
            shown = samples[-1][0]
            preview = _preview(samples[-1][1])
        bar.update_absolute(status.step, max(1, status.num_steps), preview)
        time.sleep(POLL_SECONDS)
    if status.state in ("failed", "lost"):
        raise ValueError(f"training job {job.id}: {status.message}")
    bar.update_absolute(status.num_steps, max(1, status.num_steps))
    return status


def _until_ended(job: Job) -> None:
    while job.status().running:
        time.sleep(POLL_SECONDS)


def _preview(files: list[Path]) -> tuple[str, Image.Image, int] | None:
    frames = next(iter(sample_frames(files)), None)
    if frames is None:
        return None
    picture = (frames[len(frames) // 2] * 255).round().byte().numpy()
    return ("JPEG", Image.fromarray(picture), 512)


def sample_frames(files: list[Path]) -> Iterator[torch.Tensor]:
    """Frames (F, H, W, 3) in [0, 1] of sample files."""
    for file in files:
        yield read_image(file)[None] if file.suffix == ".png" else read_video(file)[0].float() / 255


def lora_weights(path: Path) -> dict[str, Any]:
    """A LoRA file as ComfyUI's LORA_MODEL: its keys, with alphas, which Save LoRA would lose as metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        alpha = (file.metadata() or {}).get("lora_alpha")
    downs = [name for name in weights if name.endswith(".lora_A.weight")]
    if alpha is not None:
        weights |= {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(float(alpha)) for name in downs}
    return weights
