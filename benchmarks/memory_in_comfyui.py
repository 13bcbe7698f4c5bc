"""What the memory options save and what they cost in ComfyUI, through its own layers and memory management.

    python -m benchmarks.memory_in_comfyui

The error of the DiT's and of Qwen's output at full width, a few blocks with random weights, against the same weights in
bf16, with the peaks of a process of ComfyUI's Python (found as the tests find it) that loads such a file and runs it
once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PACK = Path(__file__).parents[1]
MIB = 2**20
DIT_ROWS = (
    "bf16", "bf16, swap 4", "bf16, swap 8", "fp8_e4m3fn", "fp8_e4m3fn, swap 8", "int8", "int8, swap 8", "int8_fast",
)  # fmt: skip
QWEN_ROWS = (
    "bf16", "bf16, a third loaded", "fp8", "int8", "int8, a third loaded", "nf4", "fp8 file: bf16", "fp8 file: default",
    "fp8 file: default, a third loaded",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or what one child process measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="visual blocks at Video Lite's width (default 8)")
    parser.add_argument("--layers", type=int, default=2, help="layers at Qwen2.5-VL 7B's width (default 2)")
    parser.add_argument("--child", nargs=5, metavar="VALUE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    from benchmarks.memory_options import write_models

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dit, qwen = write_models(folder, args.blocks, args.layers)
        write_fp8(qwen, folder / "qwen_fp8.safetensors")
        print(f"DiT, Video Lite's width, {args.blocks} visual blocks, {dit.stat().st_size / MIB:.0f} MiB in bf16:\n")
        table("dit", folder, DIT_ROWS)
        print(f"Qwen2.5-VL 7B's width, {args.layers} layers, {qwen.stat().st_size / MIB:.0f} MiB in bf16:\n")
        table("qwen", folder, QWEN_ROWS)


def write_fp8(source: Path, target: Path) -> None:
    """The layers of a Qwen in fp8 with one scale each, as ComfyUI's file has them."""
    from safetensors.torch import load_file, save_file

    made = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in load_file(source).items():
        made[name] = weight
        if "layers." in name and weight.ndim == 2:
            scale = weight.float().abs().max() / 448
            made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            made[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(made, target)


def table(part: str, folder: Path, rows: tuple[str, ...]) -> None:
    """Weights in memory, peaks and error of each row, from a child process each."""
    from tests.nodes.comfy_server import comfyui_path, comfyui_python

    comfyui = comfyui_path()
    if comfyui is None:
        raise SystemExit("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    lent = importlib.util.find_spec("bitsandbytes")
    library = str(Path(lent.origin).parents[1]) if lent is not None else ""
    print("| weights | MiB kept | layers that wait | loading, peak | run, peak | output error | worst |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        command = [comfyui_python(comfyui), __file__, "--child", str(comfyui), part, str(folder), row, library]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        load, run = (f"{found[key] / MIB:.0f}" for key in ("load", "run"))
        print(
            f"| {row} | {found['kept'] / MIB:.0f} | {found['waiting']} of {found['layers']} | {load} | {run} "
            f"| {found['error']:.4f} | {found['worst']:.4f} |",
            flush=True,
        )
    print()


def measure(comfyui: str, part: str, folder: str, row: str, library: str) -> dict[str, Any]:
    """Bytes and errors of one row; peaks are on top of what the process held before loading."""
    name = start_comfyui(comfyui)
    open_part, run = (open_dit, run_dit) if part == "dit" else (open_qwen, run_qwen)
    peak_of = importlib.import_module(f"{name}.kandinsky5_core.bench.peak").peak_of
    if "nf4" in row:
        sys.path.append(library)  # after ComfyUI's own packages
        importlib.import_module("bitsandbytes")
    importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    made: list[Any] = []
    loading = peak_of(lambda: made.append(open_part(name, Path(folder), row)), torch.device("cpu"))
    outputs: list[Tensor] = []
    running = peak_of(lambda: outputs.append(run(made[0])), torch.device("cpu"))
    held = running["peak_bytes"] - running["added_bytes"] - (loading["peak_bytes"] - loading["added_bytes"])
    wide = "fp8 file: bf16" if row.startswith("fp8 file") else "bf16"
    expected, found = run(open_part(name, Path(folder), wide)).float(), outputs[0].float()
    layers = [layer for layer in made[0].model.modules() if hasattr(layer, "comfy_cast_weights")]
    return {
        "kept": made[0].model_size(), "load": loading["added_bytes"], "run": running["added_bytes"] + held,
        "waiting": sum(hasattr(layer, "prev_comfy_cast_weights") for layer in layers), "layers": len(layers),
        "error": float((found - expected).norm() / expected.norm()),
        "worst": float((found - expected).abs().max() / expected.abs().max()),
    }  # fmt: skip


def start_comfyui(comfyui: str) -> str:
    """ComfyUI's modules and the pack, on the CPU with the DiT in bf16; the name that the pack got."""
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu", "--bf16-unet"]
    import comfy.options

    comfy.options.enable_args_parsing()
    spec = importlib.util.spec_from_file_location("in_comfyui", PACK / "tests" / "nodes" / "in_comfyui.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner.load_pack(PACK).__name__


def open_dit(name: str, folder: Path, row: str) -> Any:
    """A loaded MODEL."""
    bridge: Callable[[str], Any] = lambda module: importlib.import_module(f"{name}.nodes.bridge.{module}")  # noqa: E731
    config = importlib.import_module(f"{name}.kandinsky5_core.config")
    detect = importlib.import_module(f"{name}.kandinsky5_core.weights.detect")
    path, (kind, *swap) = folder / "dit.safetensors", row.split(", swap ")
    variant = replace(config.variant("lite-t2v-5s-sft"), dit=detect.inspect_file(path, want="dit").config)
    dtypes = {"bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
    model = bridge("model").load_model(path, variant, dtypes[kind.removesuffix("_fast")], fast=kind.endswith("_fast"))
    model = bridge("block_swap").swap_blocks(model, int(swap[0])) if swap else model
    model.partially_load(model.load_device, 1e32)
    return model


@torch.no_grad()
def run_dit(model: Any) -> Tensor:
    """One velocity, of inputs that are always the same."""
    torch.manual_seed(0)
    config = model.model.diffusion_model.config
    text, pooled = torch.randn(1, 64, config.in_text_dim), torch.randn(1, config.in_text_dim2)
    given = (torch.randn(1, 16, 2, 16, 24), torch.full((1,), 700.0), text, pooled)
    return model.model.diffusion_model(*(part.bfloat16() for part in given))


def open_qwen(name: str, folder: Path, row: str) -> Any:
    """A loaded patcher of a Qwen alone."""
    clip, layers = (importlib.import_module(f"{name}.nodes.bridge.{module}") for module in ("clip", "layers"))
    load_qwen = importlib.import_module(f"{name}.kandinsky5_core.text.qwen").load_qwen
    stored = row.startswith("fp8 file: ")
    kind, *part = row.removeprefix("fp8 file: ").split(", ")
    change, keep = clip.text_layers(kind, torch.bfloat16, torch.float8_e4m3fn if stored else None)
    path = folder / ("qwen_fp8.safetensors" if stored else "qwen.safetensors")
    qwen = load_qwen(path, dtype=torch.bfloat16, quantise=change, keep_stored=keep)
    models = clip.TextModels(SimpleNamespace(qwen=qwen, clip=torch.nn.Module()))
    device = torch.device("cpu")
    patcher = layers.PartlyCastable(models, load_device=device, offload_device=device)
    patcher.partially_load(device, patcher.model_size() / 3 if part else 1e32)
    return patcher


@torch.no_grad()
def run_qwen(patcher: Any) -> Tensor:
    """(1, L, D) hidden states of tokens that are always the same."""
    ids = torch.randint(0, 1000, (1, 64), generator=torch.Generator().manual_seed(0))
    return patcher.model.qwen.model(input_ids=ids, use_cache=False).last_hidden_state


if __name__ == "__main__":
    main()
