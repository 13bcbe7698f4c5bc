"""What `kandinsky5 generate`, `info` and `convert` do; each returns the values that are printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .attention.engines import probe_engines
from .fitting import budget_bytes, fitted, job_of_request
from .loading import DTYPES, ModelFiles, check_device, check_memory, find_files, load_files, resolve_dtype
from .media import check_output, read_image, read_video, write_image, write_video
from .memory.apply import compile_blocks
from .memory.options import AS_IS, DEFAULT_VAE_GIB, MemoryOptions
from .memory.peak import peak_memory_bytes
from .memory.told import choice_text
from .pipeline import Models, Result, check_vae_budget, choose_engine, fitting_variant, generate
from .request import NO_OUTPAINT, Request, resolve
from .sampling.cache_calibration import Calibration, check_calibration
from .sampling.samplers import OnStep
from .text.encoder import TextEncoder
from .text.enhancer import enhance
from .weights import lora_tools
from .weights.cache_ratios import check_writable, find_ratios, ratios_path, write_ratios
from .weights.convert import convert
from .weights.detect import inspect_file
from .weights.soup import Part
from .weights.soup_tree import Group, check_outside, group_of_folder, nested_soup, read_recipe

SNAP = 16 / 255
"""Mask values this near to black or white are that."""


def generate_command(args: argparse.Namespace) -> dict[str, object]:
    """Check everything, then load, generate and write."""
    device = check_device(args.device)
    files = find_files(
        args.model, text_encoder=args.text_encoder, clip=args.clip, vae=args.vae, tokenizers=args.tokenizers,
        variant_name=args.variant,
    )  # fmt: skip
    planned = check_left_open(args, device)
    request = request_of(args, files.variant.tasks[0])
    if not files.variant_named:
        files = replace(files, variant=fitting_variant(request, files.variant))
    request = resolve(request, files.variant)
    memory = memory_of(args)
    if planned:
        job = job_of_request(
            request, files.variant, resolve_dtype(args.dtype, device), enhanced=args.enhance, compiled=args.compile
        )
        request, memory, choice = fitted(request, job, budget_bytes(args.budget, device))
        tqdm.write(choice_text(choice), file=sys.stderr)
    check_memory(memory, files.variant)
    if request.cache_ratios is not None:
        find_ratios(files.variant, files.dit, request.cache_ratios)
    calibrated = None if args.calibrate_cache is None else calibration_path(args.calibrate_cache, files, request)
    choose_engine(request, files.variant, probe_engines(device), resolve_dtype(args.dtype, device))
    check_vae_budget(request, files.variant, resolve_dtype(args.dtype, device))
    paths = output_paths(args.out, request.batch)
    for path in paths:
        check_output(path, request.num_frames, height=request.height, width=request.width)
        check_even(path, request)
    began = time.perf_counter()
    models = load_files(files, device=args.device, dtype=args.dtype, lm_head=args.enhance, memory=memory)
    load_seconds = round(time.perf_counter() - began, 3)
    if args.compile:
        compile_blocks(models.dit)
    if args.enhance:
        request = enhanced(models.text_encoder, request)
    calibration = Calibration(request.shift) if calibrated is not None else None
    with step_bar() as on_step:
        result = generate(models, request, on_step, calibration.start if calibration else None)
    if calibration is not None:
        save_calibration(calibrated, calibration, models, request)
    for row, path in enumerate(paths):
        write_result(path, result, models.model_hash, row)
    return {
        "out": str(args.out) if len(paths) == 1 else [str(path) for path in paths],
        "seed": request.seed,
        "seconds": {"load": load_seconds, **result.seconds},
        "peak_memory_bytes": peak_memory_bytes(models.device),
        "model_hash": models.model_hash,
        "settings": result.settings,
        **({"cache": result.cache} if result.cache else {}),
        **({"calibrated": str(calibrated)} if calibrated else {}),
    }


def memory_of(args: argparse.Namespace) -> MemoryOptions:
    """The memory options that were given."""
    return MemoryOptions(
        weights=args.weights, text_weights=args.text_weights, swap_blocks=args.swap_blocks, offload=args.offload
    )


PLANNED = {
    "weights": AS_IS, "text_weights": AS_IS, "swap_blocks": 0, "offload": "stage", "vae_budget": DEFAULT_VAE_GIB,
    "batch_guidance": "auto",
}  # fmt: skip
"""Options that `--budget` chooses, with their defaults."""


def check_left_open(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether `--budget` chooses the memory options; those that were not given get their defaults.

    Raises:
        ValueError: some were given beside it, or the device is a CPU, where its savings would only cost.
    """
    given = [f"--{name.replace('_', '-')}" for name in PLANNED if getattr(args, name) is not None]
    if args.budget is not None and given:
        raise ValueError(f"--budget chooses {', '.join(given)} itself; leave out one or the other")
    if args.budget is not None and device.type == "cpu":
        raise ValueError("--budget fits a job into an accelerator's memory; add --device cuda, or leave it out")
    for name, default in PLANNED.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    return args.budget is not None


def calibration_path(named: str, files: ModelFiles, request: Request) -> Path:
    """Where the ratios of this run will be saved; raises ValueError where it cannot measure or not write there."""
    if request.cache != "off":
        raise ValueError(f"--calibrate-cache measures a whole run; use it without --cache {request.cache}")
    check_calibration(files.variant, num_steps=request.num_steps, denoise=request.denoise, sampler=request.sampler)
    path = Path(named) if named else ratios_path(files.dit)
    check_writable(path)
    return path


def save_calibration(path: Path, calibration: Calibration, models: Models, request: Request) -> None:
    """The ratios of the runs, with what they were measured on."""
    variant = fitting_variant(request, models.variant) if not models.variant_named else models.variant
    write_ratios(
        path, calibration.ratios(variant), models.weights, model_hash=models.model_hash, task=request.task,
        guidance_scale=request.guidance_scale,
    )  # fmt: skip


def check_even(path: Path, request: Request) -> None:
    """Refuse odd sides for video formats before any work: a kept clip comes back at its own size."""
    if path.suffix.lower() not in (".mp4", ".webm") or request.video is None:
        return
    height, width = request.canvas().result_size
    if height % 2 or width % 2:
        raise ValueError(f"the result is {width}x{height} and {path.suffix} needs even sides; use .gif or --fit cover")


def request_of(args: argparse.Namespace, task: str) -> Request:
    """The request that the options of `generate` make; files are read, nothing is loaded.

    Args:
        task: Where none was given.
    """
    if not args.vae_budget > 0:
        raise ValueError(f"--vae-budget must be above 0 GiB, got {args.vae_budget}")
    video, video_fps = (None, None) if args.video is None else read_clip(args.video)
    extend, extend_fps = (None, None) if args.extend is None else read_clip(args.extend)
    return Request(
        prompt=args.prompt,
        task=args.task or task,
        negative_prompt=args.negative,
        image=None if args.image is None else read_image(args.image),
        video=video,
        mask=None if args.mask is None else read_mask(args.mask),
        mask_grow=args.mask_grow,
        mask_feather=args.mask_feather,
        outpaint=NO_OUTPAINT if args.outpaint is None else parse_outpaint(args.outpaint),
        denoise=args.denoise,
        fit=args.fit,
        keyframes=read_keyframes(args.keyframe),
        loop=args.loop,
        extend=extend,
        fps=video_fps or extend_fps,
        overlap=args.overlap,
        chunks=args.chunks,
        edit_template=args.edit_template,
        width=args.width,
        height=args.height,
        num_frames=args.frames,
        num_steps=args.steps,
        guidance_scale=args.guidance,
        shift=args.shift,
        sampler=args.sampler,
        seed=args.seed,
        batch=args.batch,
        attention=args.attention,
        attention_engine=args.engine,
        batch_guidance=args.batch_guidance,
        **cache_options(args),
        vae_budget_bytes=int(args.vae_budget * 2**30),
    )


def cache_options(args: argparse.Namespace) -> dict[str, object]:
    """Fields of `Request` for the step cache."""
    names = ("cache", "cache_threshold", "cache_max_skip", "cache_retain", "cache_ratios")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def output_paths(path: Path, count: int) -> list[Path]:
    """`path`, or for several results `path-1`, `path-2` and so on."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def read_clip(path: Path) -> tuple[Tensor, float]:
    """A video file as (F, H, W, 3) fp32 in [0, 1], and its frames a second."""
    frames, fps = read_video(path)
    return frames.float() / 255, fps


def read_mask(path: Path) -> Tensor:
    """A mask from a picture (H, W) or a clip (F, H, W), by its brightness; fp32 in [0, 1]."""
    is_clip = path.suffix.lower() in (".mp4", ".webm", ".gif", ".mov", ".mkv")
    pixels = read_clip(path)[0] if is_clip else read_image(path)
    mask = pixels.mean(dim=-1)
    # What lossy files make of black and white.
    mask[mask < SNAP] = 0
    mask[mask > 1 - SNAP] = 1
    return mask


def read_keyframes(given: Sequence[str]) -> dict[int, Tensor]:
    """`FRAME=FILE` options as pictures by frame."""
    keyframes: dict[int, Tensor] = {}
    for option in given:
        name, equals, path = option.partition("=")
        name = "-1" if name == "last" else name
        if not equals or not name.removeprefix("-").isdigit():
            raise ValueError(f"--keyframe '{option}' is not FRAME=FILE, such as 0=first.png or last=end.png")
        if int(name) in keyframes:
            raise ValueError(f"--keyframe {option.partition('=')[0]} was given twice")
        keyframes[int(name)] = read_image(path)
    return keyframes


def parse_outpaint(text: str) -> tuple[int, int, int, int]:
    """`L,T,R,B` as four pixel counts."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--outpaint '{text}' is not four pixel counts L,T,R,B, such as 0,0,256,0")
    left, top, right, bottom = map(int, parts)
    return left, top, right, bottom


def enhanced(encoder: TextEncoder, request: Request) -> Request:
    """The request with the prompt that the text encoder makes of it."""
    prompt = enhance(encoder, request.prompt, task=request.task, image=request.image, seed=request.seed)
    return replace(request, prompt=prompt)


@contextmanager
def step_bar() -> Iterator[OnStep]:
    """A progress bar over sampling steps, on stderr."""
    bar = tqdm(desc="sampling", unit="step", file=sys.stderr)

    def on_step(step: int, num_steps: int, latents: Tensor) -> None:  # noqa: ARG001
        bar.total = num_steps
        bar.update(step - bar.n)

    try:
        yield on_step
    finally:
        bar.close()


def write_result(path: Path, result: Result, model_hash: str, row: int = 0) -> None:
    """One result to a file by its suffix, with the request, its seed and the model's hash in its metadata.
    """
    own = {**result.settings, "seed": result.settings["seed"] + row, "batch": 1, "model_hash": model_hash}
    metadata = {"kandinsky5": json.dumps(own)}
    frames = result.frames[row]
    if path.suffix.lower() == ".png":
        write_image(path, frames[0], metadata)
    else:
        write_video(path, frames, float(result.settings["fps"]), metadata)


def info_command(path: Path) -> dict[str, object]:
    """What a weights file or folder is."""
    return inspect_file(path).to_dict()


def lora_command(args: argparse.Namespace) -> dict[str, object]:
    """`kandinsky5 lora TOOL`."""
    if args.tool == "info":
        return lora_tools.lora_info(args.lora)
    with tensor_bar(args.target.name) as on_tensor:
        if args.tool == "convert":
            return lora_tools.convert_lora(args.lora, args.target, layout=args.layout, on_tensor=on_tensor)
        if args.tool == "resize":
            return lora_tools.resize_lora(
                args.lora, args.target, rank=args.rank, layout=args.layout, on_tensor=on_tensor
            )
        if args.tool == "merge":
            return lora_tools.merge_lora(
                args.base, args.lora, args.target, strength=args.strength, on_tensor=on_tensor
            )
        return lora_tools.extract_lora(
            args.base, args.tuned, args.target, rank=args.rank, layout=args.layout, trigger=args.trigger,
            on_tensor=on_tensor,
        )  # fmt: skip


def soup_command(args: argparse.Namespace) -> dict[str, object]:
    """`kandinsky5 soup`: the share of each part."""
    group = soup_group(args)
    with tensor_bar(args.target.name) as on_tensor:
        made = nested_soup(group, args.target, rank=args.rank, on_tensor=on_tensor)
    told = {"rank": made.rank, "kept": made.kept} if made.kind == "lora" else {}
    size = {} if made.size is None else {"samples": made.size}
    return {**made.shares, **told, **size, "target": str(args.target)}


def soup_group(args: argparse.Namespace) -> Group:
    """What the options name: files, a folder of domains, or a recipe.

    Raises:
        ValueError: none of them, or several.
    """
    if sum(map(bool, (args.parts, args.tree, args.recipe))) != 1:
        raise ValueError("give the parts as FILE[=SAMPLES] ..., or --tree FOLDER, or --recipe FILE")
    if args.recipe:
        if args.weighting or args.within:
            raise ValueError("a recipe gives its own weightings; leave out --weighting and --within")
        return read_recipe(args.recipe)
    if args.tree:
        check_outside(args.target, args.tree)
        return group_of_folder(args.tree, weighting=args.weighting or "equal", within=args.within or "sqrt")
    if args.within:
        raise ValueError("--within is for the subdomains of --tree FOLDER")
    parts = tuple(_part(text) for text in args.parts)
    return Group(name="soup", parts=parts, weighting=args.weighting or "equal")


def _part(text: str) -> Part:
    path, equals, size = text.rpartition("=")
    if not equals or Path(text).exists():
        return Part.of(Path(text))
    try:
        return Part(path=Path(path), size=float(size))
    except ValueError as error:
        raise ValueError(f"'{text}' is not FILE=SAMPLES, such as animals.safetensors=1200") from error


@contextmanager
def tensor_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over tensors, on stderr."""
    bar = tqdm(desc=name, unit="tensor", file=sys.stderr)

    def on_tensor(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield on_tensor
    finally:
        bar.close()


def convert_command(args: argparse.Namespace) -> None:
    """Rewrite weights, with a bar over the tensors."""
    with tensor_bar(args.target.name) as on_progress:
        convert(
            args.source,
            args.target,
            layout=args.layout,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            shard_size=int(args.shard_size * 1e9) if args.shard_size else None,
            on_progress=on_progress,
        )
