"""What the memory options save and what they cost.

    python -m benchmarks.memory_options --n 20

The error of the DiT's and of Qwen's output at full width, a few blocks with random weights, against the same weights in
bf16, with the peaks of a process of its own that loads such a file and runs it once; then the score of the embedded
video model under each option.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.subjects import random_dit, random_qwen
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import VIDEO_LITE, DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.memory.block_swap import BlockSwap
from kandinsky5_core.memory.options import MemoryOptions
from kandinsky5_core.memory.quantized import KINDS, load_quantized_dit, quantize_linear, torchao_config
from kandinsky5_core.memory.quantized_text import text_quantiser
from kandinsky5_core.nano.score import score_nano
from kandinsky5_core.text.qwen import load_qwen
from kandinsky5_core.weights.load import load_dit

SCORED = (
    MemoryOptions(), MemoryOptions(swap_blocks=3), MemoryOptions(weights="fp8"), MemoryOptions(weights="int8"),
    MemoryOptions(text_weights="int8"), MemoryOptions(text_weights="nf4"),
    MemoryOptions(weights="fp8", text_weights="nf4"),
)  # fmt: skip
GRID, TEXT_TOKENS = (2, 8, 12), 64
CPU = torch.device("cpu")
MIB = 2**20


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or what one child process measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20, help="cases of score-nano for each option (default 20)")
    parser.add_argument("--tasks", nargs="+", default=["t2v"], help="of score-nano (default t2v)")
    parser.add_argument("--blocks", type=int, default=8, help="visual blocks at Video Lite's width (default 8)")
    parser.add_argument("--layers", type=int, default=2, help="layers at Qwen2.5-VL 7B's width (default 2)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        dit, qwen = write_models(Path(folder), args.blocks, args.layers)
        print(f"DiT, Video Lite's width, {args.blocks} visual blocks, {dit.stat().st_size / MIB:.0f} MiB in bf16:\n")
        error_table("dit", dit, ("as-is", "swap", "fp8", "int8"))
        print(f"Qwen2.5-VL 7B's width, {args.layers} layers, {qwen.stat().st_size / MIB:.0f} MiB in bf16:\n")
        error_table("qwen", qwen, ("as-is", "int8", "nf4"))
    for task in args.tasks:
        score_table(task, args.n)


def score_table(task: str, count: int) -> None:
    """Mean marks of the embedded model under each option."""
    print(f"{task}, n {count}, seed 1:\n\n| options | score | of as-is |\n|---|---|---|")
    scores = [score_nano(count=count, seed=1, task=task, memory=options)["all"] for options in SCORED]
    for options, score in zip(SCORED, scores, strict=True):
        told = ", ".join(f"{name} {value}" for name, value in options.told().items()) or "as-is"
        print(f"| {told} | {score:.3f} | {score / scores[0]:.3f} |")
    print()


def error_table(part: str, path: Path, options: tuple[str, ...]) -> None:
    """Weights in memory, peaks and error of each option, from a child process each."""
    print("| weights | MiB kept | loading, peak | run, peak | output error | worst |\n|---|---|---|---|---|---|")
    for option in options:
        command = [sys.executable, "-m", "benchmarks.memory_options", "--child", part, str(path), option]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = " | ".join(f"{found[key] / MIB:.0f}" for key in ("weights", "load", "run"))
        print(f"| {option} | {sizes} | {found['error']:.4f} | {found['worst']:.4f} |")
    print()


def measure(part: str, path: str, option: str) -> dict[str, float]:
    """Bytes and errors of one option; peaks are on top of what the process held before loading."""
    load, run = (open_dit, run_dit) if part == "dit" else (open_qwen, run_qwen)
    import_libraries(option)
    made: list[object] = []
    loading = peak_of(lambda: made.append(load(path, option)), CPU)
    outputs: list[Tensor] = []
    running = peak_of(lambda: outputs.append(run(made[0])), CPU)
    held = running["peak_bytes"] - running["added_bytes"] - (loading["peak_bytes"] - loading["added_bytes"])
    expected, found = run(load(path, "as-is")).float(), outputs[0].float()
    difference = found - expected
    return {
        "weights": stored_bytes(made[0]), "load": loading["added_bytes"], "run": running["added_bytes"] + held,
        "error": float(difference.norm() / expected.norm()),
        "worst": float(difference.abs().max() / expected.abs().max()),
    }  # fmt: skip


def import_libraries(option: str) -> None:
    """What an option imports is no part of its peak."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    layer = torch.nn.Linear(64, 64).bfloat16()
    if option == "nf4":
        text_quantiser(option)(layer)
    elif option in KINDS:
        quantize_linear(layer, torchao_config(option))


def stored_bytes(model: torch.nn.Module) -> int:
    """Of all parameters, quantised ones as they are kept."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    scales = 0 if state is None else state.absmax.nbytes
    return tensor.nbytes + scales


def write_models(folder: Path, blocks: int, layers: int) -> tuple[Path, Path]:
    """Files of random weights at full width."""
    config = replace(VIDEO_LITE, num_visual_blocks=blocks)
    dit = random_dit(config, CPU, torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in dit.state_dict().items()}, folder / "dit.safetensors")
    del dit
    qwen = random_qwen(layers, CPU, torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in qwen.state_dict().items()}
    save_file(state, folder / "qwen.safetensors")
    return folder / "dit.safetensors", folder / "qwen.safetensors"


def open_dit(path: str, option: str) -> DiffusionTransformer:
    """A DiT under an option."""
    dit, _ = load_quantized_dit(path, option) if option in ("fp8", "int8") else load_dit(path)
    if option == "swap":
        BlockSwap(dit, len(dit.visual_transformer_blocks), CPU)
    return dit.eval().requires_grad_(False)


@torch.no_grad()
def run_dit(dit: DiffusionTransformer) -> Tensor:
    """One velocity, of inputs that are always the same."""
    config: DiTConfig = dit.config
    torch.manual_seed(0)
    frames, height, width = GRID
    text = TextConditioning(
        embeds=torch.randn(1, TEXT_TOKENS, config.in_text_dim).bfloat16(),
        pooled=torch.randn(1, config.in_text_dim2).bfloat16(), mask=torch.ones(1, TEXT_TOKENS, dtype=torch.bool),
    )  # fmt: skip
    latents = torch.randn(1, config.input_channels, frames, 2 * height, 2 * width).bfloat16()
    plan = plan_visual(config, GRID, (1.0, 1.0, 1.0), None)
    return dit(latents, torch.full((1,), 700.0), text, plan)


def open_qwen(path: str, option: str) -> torch.nn.Module:
    """A Qwen under an option."""
    return load_qwen(path, quantise=text_quantiser(option))


@torch.no_grad()
def run_qwen(qwen: torch.nn.Module) -> Tensor:
    """(1, L, D) hidden states of tokens that are always the same."""
    ids = torch.randint(0, 1000, (1, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    return qwen.model(input_ids=ids, use_cache=False).last_hidden_state


if __name__ == "__main__":
    main()
