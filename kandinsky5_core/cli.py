"""The `kandinsky5` command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import NoReturn

from .config import VARIANTS
from .memory.options import DEFAULT_VAE_GIB, OFFLOADS, TEXT_WEIGHTS, WEIGHTS

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    # The Windows console may not be UTF-8; a prompt must not end the run with an encoding error.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        args.run(args)
    except ValueError as error:
        print(f"kandinsky5 {args.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"kandinsky5 {args.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"kandinsky5 {args.command}: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line, as every other bad input is answered."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command and option."""
    parser = Parser(prog="kandinsky5", description="Run Kandinsky 5.0 from the command line.")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which paths and settings are taken")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_demo(commands)
    _add_info(commands)
    _add_convert(commands)
    _add_score(commands)
    _add_bench(commands)
    _add_plan(commands)
    _add_lora(commands)
    _add_soup(commands)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano-video", help="embedded model, or a DiT file (default nano-video)")
    parser.add_argument("--variant", choices=sorted(VARIANTS), metavar="NAME",
                        help="what the model file is, where it serves several uses (see `info`)")  # fmt: skip
    parser.add_argument("--text-encoder", help="Qwen2.5-VL: folder or single file")
    parser.add_argument("--clip", help="CLIP ViT-L/14: folder or clip_l.safetensors")
    parser.add_argument("--vae", help="VAE: folder or single file")
    parser.add_argument("--tokenizers", help="folder with the tokenizers, or of a ComfyUI installation")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default cpu)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default bf16, on the CPU fp32")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="make a video or an image from a prompt")
    _add_models(parser)
    _add_memory(parser)
    parser.add_argument("--task", help="t2v, i2v, t2i or i2i (default: the model's first)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", help="what should not be seen; default the variant's")
    _add_given(parser)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int, help="4k+1")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--shift", type=float, help="warp of the sigma schedule")
    parser.add_argument("--sampler", default="euler", help="euler, heun or ab2 (default euler)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1, help="results, with consecutive seeds and numbered files")
    parser.add_argument("--attention", default="auto", help="auto, dense or nabla (default auto: as trained)")
    parser.add_argument("--engine", default="auto", help="for dense attention: sdpa, flash3, cudnn, flash, "
                        "sage or flex (default auto: the fastest exact one)")  # fmt: skip
    parser.add_argument("--batch-guidance", help="both passes of guidance at once: on, off or auto (default auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the DiT's blocks; once for all sizes")
    _add_cache(parser).add_argument(
        "--calibrate-cache", nargs="?", const="", metavar="FILE",
        help="make this result without a cache, measure the model's ratios in it and save them in FILE, by default "
        "beside the model, where they are found from then on",
    )  # fmt: skip
    parser.add_argument("--enhance", action="store_true", help="let the text encoder write out the prompt first")
    parser.add_argument("--vae-budget", type=float, help="GiB that the VAE's work may take "
                        f"(default {DEFAULT_VAE_GIB:g})")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help=".mp4, .webm, .gif or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the result")
    parser.set_defaults(run=_generate)


def _add_cache(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    cache = parser.add_argument_group("step cache")
    cache.add_argument("--cache", default="off", help="magcache skips steps that change little (default off)")
    cache.add_argument("--cache-threshold", type=float, metavar="X", help="error that skipped steps may add up to; 0 "
                       "skips none (default the variant's; of the released ones 0.12)")  # fmt: skip
    cache.add_argument("--cache-max-skip", type=int, default=2, metavar="K", help="skipped in a row (default 2)")
    cache.add_argument("--cache-retain", type=float, metavar="R", help="share of the run, from its beginning, that is "
                       "computed (default the variant's; of the released ones 0.2)")  # fmt: skip
    cache.add_argument("--cache-ratios", type=Path, metavar="FILE",
                       help="measured ratios; default those beside the model, else the released ones")  # fmt: skip
    return cache


def _add_memory(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    memory = parser.add_argument_group("memory")
    memory.add_argument("--budget", metavar="GB", help="memory of the device, or auto: choose the options below, "
                        "--vae-budget and --batch-guidance as `kandinsky5 plan` does")  # fmt: skip
    memory.add_argument("--weights", choices=WEIGHTS, help="linear layers of the "
                        "DiT's blocks in eight bits, half of bf16; needs torchao (default as-is)")  # fmt: skip
    memory.add_argument("--text-weights", choices=TEXT_WEIGHTS, help="Qwen's layers in "
                        "eight bits (torchao) or four (bitsandbytes)")  # fmt: skip
    memory.add_argument("--swap-blocks", type=int, metavar="N", help="visual blocks that wait in CPU "
                        "memory and come to the device ahead of their turn (default 0)")  # fmt: skip
    memory.add_argument("--offload", choices=OFFLOADS, help="stage (default): each network "
                        "is on the device for its own stage only; none: all stay there")  # fmt: skip
    return memory


def _add_given(parser: argparse.ArgumentParser) -> None:
    given = parser.add_argument_group("pictures and clips to work with")
    given.add_argument("--image", type=Path, help="i2v: first frame; i2i: picture to edit; t2i: picture to start from")
    given.add_argument("--video", type=Path, help="t2v: clip to start from, with --denoise, --mask or --outpaint")
    given.add_argument("--mask", type=Path, help="picture or clip of the same size: black stays, white is made anew")
    given.add_argument("--mask-grow", type=int, default=0, metavar="PIXELS", help="negative shrinks it")
    given.add_argument("--mask-feather", type=int, default=0, metavar="PIXELS", help="blend over the mask's edge")
    given.add_argument("--outpaint", metavar="L,T,R,B", help="pixels to add left, top, right and bottom")
    given.add_argument("--denoise", type=float, default=1.0, help="0.4 keeps much of what is given, 1 nothing")
    given.add_argument("--fit", choices=("cover", "keep"), help="scale and crop the picture, or keep all of it")
    given.add_argument("--keyframe", action="append", default=[], metavar="FRAME=FILE",
                       help="picture at a frame, a number or `last`; may be given again")  # fmt: skip
    given.add_argument("--loop", action="store_true", help="end where the clip began")
    given.add_argument("--extend", type=Path, metavar="FILE", help="clip that goes on; the result begins with it")
    given.add_argument("--overlap", type=int, default=5, help="its last frames that the model sees, 4k+1 (default 5)")
    given.add_argument("--chunks", type=int, default=1, help="how often it goes on (default 1)")
    given.add_argument("--edit-template", default="snapshot", help="i2i: snapshot (default), one-line or diffusers")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="show what the embedded models do, offline")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_demo)


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="what a weights file is")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_info)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="write weights in another layout or dtype")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", required=True, help="official, diffusers, comfyui; VAEs also tencent, bfl")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default as in the source")
    parser.add_argument("--shard-size", type=float, metavar="GB", help="split a diffusers folder into files this big")
    parser.set_defaults(run=_convert)


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("score-nano", help="score the embedded models on random prompts of their language")
    parser.add_argument("--n", type=int, default=100, help="cases (default 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", default="t2v", help="t2v, i2v, keyframes, extend, loop, t2i, i2i or inpaint")
    parser.add_argument("--model", choices=[name for name in VARIANTS if name.startswith("nano-")], metavar="NAME",
                        help="nano-video, nano-image or nano-edit; default the one made for the task")  # fmt: skip
    _add_cache(parser)
    _add_memory(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_score)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure time and memory of each stage on this machine")
    parser.add_argument("--variant", default="lite-t2v-5s-sft", help="sizes to measure (default lite-t2v-5s-sft)")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="text, dit, vae_encode, vae_decode, load (default "
                        "these) and attention (NABLA beside dense)")  # fmt: skip
    parser.add_argument("--height", type=int, help="pixels (default the variant's)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int, help="4k+1")
    parser.add_argument("--sizes", nargs="+", metavar="HxWxF", help="several sizes instead, such as 512x768x121")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default cpu)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default bf16, on the CPU fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's own choice)")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs, after one that is not (default 5)")
    parser.add_argument("--random-weights", action="store_true", help="also for an embedded model; default for others")
    parser.add_argument("--model", help="DiT file or folder of that variant")
    parser.add_argument("--vae", help="VAE file or folder")
    parser.add_argument("--blocks", type=int, help="visual blocks to measure, at full width (default all)")
    parser.add_argument("--text-layers", type=int, help="layers of Qwen2.5-VL 7B to measure (default all 28)")
    parser.add_argument("--text-tokens", type=int, default=128, help="tokens of the prompt (default 128)")
    parser.add_argument("--attention", default="auto", help="auto, dense or nabla (default auto: as trained)")
    parser.add_argument("--engine", default="auto", help="for dense attention: auto, sdpa, flash3, cudnn, flash, "
                        "sage or flex")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the DiT's blocks")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="stage attention: lengths")
    parser.add_argument("--heads", type=int, help="stage attention (default the variant's, on the CPU 4)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of blocks that NABLA drops, in stage "
                        "attention and, with random weights, in stage dit (default 0.9)")  # fmt: skip
    parser.add_argument("--against", help="diffusers: its classes with the same weights, in turns with ours")
    parser.add_argument("--compile-rival", action="store_true", help="that rival compiled as well, by its own means")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png; needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_bench)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plan", help="what a job will need, and the settings that fit a card")
    parser.add_argument("--variant", default="lite-t2v-5s-sft", help="default lite-t2v-5s-sft")
    parser.add_argument("--task", help="t2v, i2v, t2i or i2i (default: the variant's first)")
    parser.add_argument("--height", type=int, help="pixels (default the variant's)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int, help="4k+1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, help="1 is none (default the variant's)")
    parser.add_argument("--attention", choices=("auto", "dense", "nabla"), default="auto")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--cache", action="store_true", help="with a step cache, which keeps tokens on the device")
    parser.add_argument("--compile", action="store_true", help="with compiled blocks, which take more at once")
    parser.add_argument("--budget", type=float, metavar="GB", help="memory of the card (default: a table of 8 to 80)")
    parser.add_argument("--cpu-memory", type=float, metavar="GB", help="memory beside it (default: not looked at)")
    parser.add_argument("--train", type=Path, metavar="JOB", help="job.json: what its steps need instead")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_plan)


def _add_lora(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("lora", help="merge, extract, resize, convert or describe LoRA files")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    layouts = ("official", "diffusers", "comfyui", "kohya")
    merge = tools.add_parser("merge", help="bake a LoRA into a base model")
    merge.add_argument("base", type=Path)
    merge.add_argument("lora", type=Path)
    merge.add_argument("target", type=Path)
    merge.add_argument("--strength", type=float, default=1.0)
    extract = tools.add_parser("extract", help="the difference of a fine-tune from its base as a LoRA")
    extract.add_argument("base", type=Path)
    extract.add_argument("tuned", type=Path)
    extract.add_argument("target", type=Path)
    extract.add_argument("--rank", type=int, default=32)
    extract.add_argument("--layout", choices=layouts, default="diffusers")
    extract.add_argument("--trigger", default="", help="trigger word to put into the file")
    resize = tools.add_parser("resize", help="the same LoRA at another rank")
    resize.add_argument("lora", type=Path)
    resize.add_argument("target", type=Path)
    resize.add_argument("--rank", type=int, required=True)
    resize.add_argument("--layout", choices=layouts, help="default as in the file")
    convert = tools.add_parser("convert", help="the same LoRA under another loader's key names")
    convert.add_argument("lora", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--layout", choices=layouts, required=True)
    info = tools.add_parser("info", help="what a LoRA file is")
    info.add_argument("lora", type=Path)
    for tool in (merge, extract, resize, convert, info):
        tool.add_argument("--json", action="store_true")
        tool.set_defaults(run=_lora)


def _add_soup(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("soup", help="average fine-tunes, or LoRAs, of one base, in one level or more")
    parser.add_argument("target", type=Path)
    parser.add_argument("parts", nargs="*", metavar="FILE[=SAMPLES]",
                        help="fine-tunes, each with its domain's samples for --weighting size or sqrt")  # fmt: skip
    parser.add_argument("--tree", type=Path, metavar="FOLDER", help="<domain>/<subdomain>.safetensors: two levels")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="JSON of any levels: parts, weighting, file, size")
    parser.add_argument("--weighting", choices=("equal", "size", "sqrt"), help="of the domains (default equal)")
    parser.add_argument("--within", choices=("equal", "size", "sqrt"), help="of the subdomains (default sqrt)")
    parser.add_argument("--rank", type=int, help="of a soup of LoRAs (default the sum of theirs, which is exact)")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_soup)


def _lora(args: argparse.Namespace) -> None:
    from .commands import lora_command

    _say(args, lora_command(args))


def _soup(args: argparse.Namespace) -> None:
    from .commands import soup_command

    _say(args, soup_command(args))


def _generate(args: argparse.Namespace) -> None:
    # The commands import what they need themselves: torch takes seconds that --help should not.
    from .commands import generate_command

    _say(args, generate_command(args))


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo_command

    _say(args, demo_command(args.out))


def _info(args: argparse.Namespace) -> None:
    from .commands import info_command

    _say(args, info_command(args.file))


def _convert(args: argparse.Namespace) -> None:
    from .commands import convert_command

    convert_command(args)


def _score(args: argparse.Namespace) -> None:
    from .commands import cache_options, memory_of
    from .nano.score import score_nano

    options = {} if args.cache == "off" else cache_options(args)
    found = score_nano(
        count=args.n, seed=args.seed, task=args.task, models=args.model, options=options, memory=memory_of(args)
    )
    _say(args, found)


def _bench(args: argparse.Namespace) -> None:
    from .bench.run import bench_command, bench_table

    report = bench_command(args)
    print(json.dumps(report, indent=1) if args.json else bench_table(report))


def _plan(args: argparse.Namespace) -> None:
    from .planning import plan_command

    text, values = plan_command(args)
    print(json.dumps(values, indent=1) if args.json else text)


def _say(args: argparse.Namespace, values: dict[str, object]) -> None:
    """One JSON object with --json, else a line for each value."""
    if args.json:
        print(json.dumps(values, indent=1, default=str))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
