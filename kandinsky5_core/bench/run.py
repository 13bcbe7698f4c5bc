"""`kandinsky5 bench`: from options to a plan, and from a plan to what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..attention.engines import probe_engines
from ..config import Variant, variant
from ..loading import check_device, find_files, load_text_of, resolve_dtype
from ..shapes import VideoShape
from .machine import facts, matmul
from .peak import peak_of
from .report import MATMUL, Row, check_plot, plot, row_of, table
from .rivals import check_rival
from .stages import STAGES, Case, Plan, blocks_note, cases
from .subjects import QWEN, fewer_blocks
from .timing import Samples, alternate

DEFAULT_STAGES = ("text", "dit", "vae_encode", "vae_decode", "load")
DEFAULT_TEXT_TOKENS = 128
CPU_ATTENTION_HEADS = 4


def bench_command(args: argparse.Namespace) -> dict[str, object]:
    """Measure what the options ask for; with --out also written as JSON, with --plot drawn."""
    plan, stages = plan_of(args)
    for path in (args.out, args.plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist; make it, or write elsewhere")
    if args.plot is not None:
        check_plot(args.plot)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for stage in stages:
        for row in measured(stage, plan, args.repeats):
            rows.append(row)
            tqdm.write(f"{row['stage']}, {row['what']}: {row['seconds']:.3g} s", file=sys.stderr)
    report = {
        "variant": plan.variant.name, "measured": blocks_note(plan), "machine": facts(plan.device, plan.dtype),
        "engine": plan.engine.told, "against": against_version(plan.against), "rows": rows,
    }  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(rows, args.plot)
    return report


def bench_table(report: dict[str, object]) -> str:
    """The report for people."""
    head = [f"{name}: {value}" for name, value in report.items() if name not in ("rows", "machine") and value]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return "\n".join([*head, machine, "", table(report["rows"])])


def plan_of(args: argparse.Namespace) -> tuple[Plan, list[str]]:
    """The plan and the stages that the options name.

    Raises:
        ValueError: an option that cannot be; nothing has been measured yet.
    """
    row = variant(args.variant)
    stages = list(dict.fromkeys(args.stage or DEFAULT_STAGES))
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"--stage '{stage}' is unknown; use {', '.join(STAGES)}")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} must be at least 1")
    if args.against is not None:
        check_rival(args.against)
    elif args.compile_rival:
        raise ValueError("--compile-rival needs a rival: add --against diffusers")
    device = check_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    config = fewer_blocks(row.dit, args.blocks)
    layers = QWEN["num_hidden_layers"] if args.text_layers is None else args.text_layers
    if not 1 <= layers <= QWEN["num_hidden_layers"]:
        raise ValueError(f"--text-layers {layers} must be 1 to {QWEN['num_hidden_layers']}")
    if not 1 <= args.text_tokens <= row.max_text_tokens:
        raise ValueError(f"--text-tokens {args.text_tokens} must be 1 to {row.max_text_tokens}, which {row.name} reads")
    heads = args.heads or (CPU_ATTENTION_HEADS if device.type == "cpu" else config.num_heads)
    return Plan(
        variant=row, config=config, shapes=shapes_of(args, row), device=device, dtype=dtype,
        engine=probe_engines(device).choose(args.engine, head_dim=config.head_dim, dtype=dtype),
        attention=args.attention, text_tokens=args.text_tokens, text_layers=layers, compiled=args.compile,
        against=args.against, compile_rival=args.compile_rival, files=files_of(args, row),
        attention_tokens=tuple(args.tokens),
        attention_heads=heads, sparsity=args.sparsity,
        text_encoder=embedded_text(row, dtype) if "text" in stages and is_embedded(row) else None,
    ), stages  # fmt: skip


def is_embedded(row: Variant) -> bool:
    """The wheel has this variant's weights."""
    return row.family.startswith("Nano")


def embedded_text(row: Variant, dtype: torch.dtype) -> object:
    """The text encoder of an embedded model."""
    return load_text_of(find_files(row.name), dtype)


def files_of(args: argparse.Namespace, row: Variant) -> dict[str, Path]:
    """Weights to measure with: those that were named, else of an embedded model its own, else none."""
    if args.random_weights and (args.model or args.vae):
        raise ValueError("--random-weights measures without files; leave out --model and --vae")
    found = {name: Path(path) for name, path in (("dit", args.model), ("vae", args.vae)) if path}
    for path in found.values():
        if not path.exists():
            raise ValueError(f"'{path}' does not exist")
    if not found and not args.random_weights and is_embedded(row):
        own = find_files(row.name)
        found = {"dit": own.dit, "vae": own.vae}
    return found


def shapes_of(args: argparse.Namespace, row: Variant) -> tuple[VideoShape, ...]:
    """The sizes to measure, checked."""
    if args.sizes:
        if args.height or args.width or args.frames:
            raise ValueError("give --sizes or --height, --width and --frames, not both")
        sizes = [parse_size(text) for text in args.sizes]
    else:
        height, width = args.height or row.resolutions[0][0], args.width or row.resolutions[0][1]
        sizes = [(height, width, args.frames or row.num_frames)]
    shapes = tuple(VideoShape(1, frames, height, width) for height, width, frames in sizes)
    for shape in shapes:
        shape.check(row.vae)
        if row.num_frames == 1 and shape.frames > 1:
            raise ValueError(f"{row.name} makes pictures; --frames {shape.frames} must be 1")
    return shapes


def parse_size(text: str) -> tuple[int, int, int]:
    """`HEIGHTxWIDTHxFRAMES` as numbers; without frames a picture."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise ValueError(f"--sizes '{text}' is not HEIGHTxWIDTHxFRAMES, such as 512x768x121")
    height, width, *frames = map(int, parts)
    return height, width, frames[0] if frames else 1


@torch.inference_mode()
def measured(stage: str, plan: Plan, repeats: int) -> Iterator[Row]:
    """The rows of one stage, as they come."""
    multiply, matmul_flops = matmul(plan.config, plan.device, plan.dtype)
    for case in cases(stage, plan):
        peaks, errors = once(case, plan.device)
        functions = {"ours": case.run, **case.beside, **({MATMUL: multiply} if case.flops else {})}
        samples: dict[str, Samples] = alternate(functions, plan.device, repeats=repeats)
        yield row_of(case, samples, peaks, matmul_flops, errors)


def once(case: Case, device: torch.device) -> tuple[dict[str, dict[str, object]], dict[str, float]]:
    """The first run of everything: its peak memory, and how far the others' outputs are from ours."""
    outputs: dict[str, object] = {}

    def keep(name: str, run: Callable[[], object]) -> Callable[[], None]:
        def work() -> None:
            outputs[name] = run()

        return work

    if device.type == "cuda":
        case.run()  # What compiling and choosing kernels takes is no part of the peak.
    peaks = {"ours": peak_of(keep("ours", case.run), device)}
    errors = {}
    for name, run in case.beside.items():
        if device.type == "cuda":
            run()
        peaks[name] = peak_of(keep(name, run), device)
        found = outputs.pop(name)
        if case.same_output and isinstance(found, Tensor):
            errors[name] = relative_error(outputs["ours"], found)
    return peaks, errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def against_version(name: str | None) -> str | None:
    """The package that ran beside ours, with its version."""
    if name is None:
        return None
    from importlib.metadata import version

    return f"{name} {version(name)}"
