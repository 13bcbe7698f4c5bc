"""What `kandinsky5 generate`, `info` and `convert` do; each returns the values that are printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from .loading import DTYPES, check_device, find_files, load_files
from .media import check_output, read_image, write_image, write_video
from .memory.peak import peak_memory_bytes
from .pipeline import Request, Result, fitting_variant, generate, resolve
from .sampling.samplers import OnStep
from .text.encoder import TextEncoder
from .text.enhancer import enhance
from .weights.convert import convert
from .weights.detect import inspect_file


def generate_command(args: argparse.Namespace) -> dict[str, object]:
    """Check everything, then load, generate and write."""
    check_device(args.device)
    files = find_files(
        args.model, text_encoder=args.text_encoder, clip=args.clip, vae=args.vae, tokenizers=args.tokenizers,
        variant_name=args.variant,
    )  # fmt: skip
    request = _request(args)
    if not files.variant_named:
        files = replace(files, variant=fitting_variant(request, files.variant))
    request = resolve(request, files.variant)
    check_output(args.out, request.num_frames, height=request.height, width=request.width)
    began = time.perf_counter()
    models = load_files(files, device=args.device, dtype=args.dtype, lm_head=args.enhance)
    load_seconds = round(time.perf_counter() - began, 3)
    if args.enhance:
        request = enhanced(models.text_encoder, request)
    with step_bar() as on_step:
        result = generate(models, request, on_step)
    write_result(args.out, result, models.model_hash)
    return {
        "out": str(args.out),
        "seed": request.seed,
        "seconds": {"load": load_seconds, **result.seconds},
        "peak_memory_bytes": peak_memory_bytes(models.device),
        "model_hash": models.model_hash,
        "settings": result.settings,
    }


def _request(args: argparse.Namespace) -> Request:
    if not args.vae_budget > 0:
        raise ValueError(f"--vae-budget must be above 0 GiB, got {args.vae_budget}")
    return Request(
        prompt=args.prompt,
        task=args.task,
        negative_prompt=args.negative,
        image=None if args.image is None else read_image(args.image),
        width=args.width,
        height=args.height,
        num_frames=args.frames,
        num_steps=args.steps,
        guidance_scale=args.guidance,
        shift=args.shift,
        sampler=args.sampler,
        seed=args.seed,
        attention=args.attention,
        vae_budget_bytes=int(args.vae_budget * 2**30),
    )


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


def write_result(path: Path, result: Result, model_hash: str) -> None:
    """One clip to a file by its suffix, with the request, the seed and the model's hash in its metadata."""
    metadata = {"kandinsky5": json.dumps({**result.settings, "model_hash": model_hash})}
    frames = result.frames[0]
    if path.suffix.lower() == ".png":
        write_image(path, frames[0], metadata)
    else:
        write_video(path, frames, int(result.settings["fps"]), metadata)


def info_command(path: Path) -> dict[str, object]:
    """What a weights file or folder is."""
    return inspect_file(path).to_dict()


def convert_command(args: argparse.Namespace) -> None:
    """Rewrite weights, with a bar over the tensors."""
    bar = tqdm(desc=args.target.name, unit="tensor", file=sys.stderr)

    def on_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        convert(
            args.source,
            args.target,
            layout=args.layout,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            shard_size=int(args.shard_size * 1e9) if args.shard_size else None,
            on_progress=on_progress,
        )
    finally:
        bar.close()
