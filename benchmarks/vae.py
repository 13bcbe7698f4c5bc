"""The VAE within a memory budget beside the untiled pass and the official tiles.

    python -m benchmarks.vae --weights nano --size 128x192 --frames 33 --out runs/vae
    python -m benchmarks.vae --weights wide --size 64x64 --frames 17
    python -m benchmarks.vae --weights nano --size 128x192 --flat 17 33 65 129

Weights: Nano's trained ones, or random ones of the released width. Times are taken in turns in one process, peak memory
of each case in a process of its own. PSNR and seams are against the untiled pass: the seam figure is the error's jump
where the official tiles meet, in time and space, over its jump elsewhere (1: no seams). Prints Markdown; --out also
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.timing import alternate, ratio
from kandinsky5_core.config import HUNYUAN_VAE
from kandinsky5_core.loading import load
from kandinsky5_core.nano.drawing import random_clip
from kandinsky5_core.shapes import LatentShape
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.hunyuan.passes import decode_streamed, encode_streamed
from kandinsky5_core.vae.pass_plan import PassPlan, describe, plan_bytes, plan_pass
from kandinsky5_core.vae.stream_plan import StreamPlan
from kandinsky5_core.vae.tile_plan import TilePlan, latents_of_pixels
from kandinsky5_core.vae.tiling import decode_tiled, encode_tiled, tile_axes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Way:
    """One way to run a pass."""

    name: str
    plan: PassPlan | None
    """None: untiled."""

    def run(self, vae: HunyuanVAE, direction: str, given: Tensor) -> Tensor:
        """Latents or pixels."""
        if self.plan is None:
            with torch.no_grad():
                return getattr(vae, direction)(given)
        streamed = isinstance(self.plan, StreamPlan)
        passes = {"encode": (encode_tiled, encode_streamed), "decode": (decode_tiled, decode_streamed)}
        return passes[direction][streamed](vae, given, self.plan)


@dataclass
class Row:
    """The figures of one way."""

    direction: str
    clip: str
    way: str
    times_as_long: float
    """As the untiled pass, by process time."""
    seconds: float
    peak_mib: float
    psnr: float
    seams: float


def official_tiles(shape: LatentShape, parts: int) -> TilePlan:
    """The official release's tiles: 17 frames every 8, and `parts` pieces of each side with 32 pixels shared."""
    sides = [size if parts == 1 else min(size, math.ceil(size / parts) + 2) for size in (shape.height, shape.width)]
    overlaps = [4 if side < size else 0 for side, size in zip(sides, (shape.height, shape.width), strict=True)]
    frames = min(5, shape.frames)
    return TilePlan(
        frames=frames, height=sides[0], width=sides[1], overlap_frames=3 if frames < shape.frames else 0,
        overlap_height=overlaps[0], overlap_width=overlaps[1],
    )  # fmt: skip


def ways_of(
    vae: HunyuanVAE, direction: str, shape: LatentShape, dtype: torch.dtype, parts: int, shares: list[float]
) -> list[Way]:
    """Untiled, official tiles of whole frames and of parts, ours with budgets that are shares of what untiled takes."""
    sizes = {"direction": direction, "bytes_per_element": dtype.itemsize}
    untiled = TilePlan(frames=shape.frames, height=shape.height, width=shape.width)
    needed = plan_bytes(untiled, shape, vae.config, **sizes)
    ways = [Way("untiled", None), Way("official, 17 frames", official_tiles(shape, 1))]
    if parts > 1:
        ways.append(Way(f"official, 17 frames, {parts}x{parts}", official_tiles(shape, parts)))
    for share in shares:
        plan = plan_pass(shape, vae.config, budget_bytes=int(share * needed), **sizes)
        ways.append(Way(f"ours, {share:.0%} of untiled: {describe(plan, shape, vae.config)}", plan))
    return ways


def models_of(args: argparse.Namespace) -> HunyuanVAE:
    """The weights that are asked for."""
    if args.weights == "nano":
        vae = load("nano-video").vae
    else:
        torch.manual_seed(args.seed)
        vae = HunyuanVAE(HUNYUAN_VAE)
    return vae.to(args.device, DTYPES[args.dtype]).eval().requires_grad_(False)


def given_of(args: argparse.Namespace, vae: HunyuanVAE, direction: str, frames: int) -> Tensor:
    """A drawn clip as pixels, or its latents (of random weights, and to measure memory, noise), (1, C, F, H, W)."""
    height, width = (int(side) for side in args.size.split("x"))
    _, drawn = random_clip(random.Random(args.seed), frames, (height, width))
    pixels = (drawn * 2 - 1).permute(3, 0, 1, 2)[None]
    if direction == "encode":
        return pixels.to(args.device, DTYPES[args.dtype])
    shape = latents_of_pixels(pixels.shape, vae.config)
    if args.weights == "nano" and args.child is None:
        return Way("untiled", None).run(vae, "encode", pixels.to(args.device, DTYPES[args.dtype]))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    return noise.to(args.device, DTYPES[args.dtype])


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of the range of `wanted`, in dB."""
    error = (found.float() - wanted.float()).square().mean()
    return (20 * torch.log10(wanted.float().max() - wanted.float().min()) - 10 * torch.log10(error)).item()


def seams(
    found: Tensor, wanted: Tensor, tiles: TilePlan, shape: LatentShape, direction: str, vae: HunyuanVAE
) -> float:
    """Mean jump of the error from one position to the next where tiles meet, over that elsewhere; 1 without seams."""
    error = (found.float() - wanted.float()).squeeze(0)
    at, away = [], []
    for dim, pieces in enumerate(tile_axes(shape, tiles, vae.config, to_pixels=direction == "decode"), start=1):
        jumps = error.diff(dim=dim).abs().mean(dim=[other for other in range(4) if other != dim])
        edges = {edge for piece in pieces for edge in (piece.write.start, piece.write.stop)}
        met = {edge - 1 for edge in edges if 0 < edge <= len(jumps)}
        at += [jumps[place].item() for place in met]
        away += [jumps[place].item() for place in range(len(jumps)) if place not in met]
    return math.nan if not at or not sum(away) else (sum(at) / len(at)) / (sum(away) / len(away))


def peak_in_child(args: argparse.Namespace, direction: str, frames: int, number: int) -> float:
    """MiB that a way's pass adds, measured in a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.vae", "--child", direction, str(frames), str(number)]
    for name in ("weights", "size", "dtype", "device", "seed", "threads", "parts"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--budgets", *map(str, args.budgets)]
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(found.stdout.splitlines()[-1])["added_bytes"] / 2**20


def child(args: argparse.Namespace) -> None:
    """One way's peak, as JSON."""
    direction, frames, number = args.child[0], int(args.child[1]), int(args.child[2])
    vae = models_of(args)
    given = given_of(args, vae, direction, frames)
    way = _ways(args, vae, direction, frames)[number]
    small = given[:, :, :1, :8, :8] if direction == "decode" else given[:, :, :1, :64, :64]
    Way("warm", None).run(vae, direction, small)
    print(json.dumps(peak_of(lambda: way.run(vae, direction, given), torch.device(args.device))))


def _ways(args: argparse.Namespace, vae: HunyuanVAE, direction: str, frames: int) -> list[Way]:
    height, width = (int(side) for side in args.size.split("x"))
    shape = latents_of_pixels((1, 3, frames, height, width), vae.config)
    if (args.child is not None and not args.budgets) or args.flat:
        plan = StreamPlan(
            exact_levels=1, frames=4, height=shape.height, width=shape.width, windows=1, window_height=shape.height,
            window_width=shape.width,
        )  # fmt: skip
        return [Way("untiled", None), Way("streamed, 4 frames at a time", plan)]
    return ways_of(vae, direction, shape, DTYPES[args.dtype], args.parts, args.budgets)


def compare(args: argparse.Namespace, direction: str, frames: int) -> list[Row]:
    """All ways of one clip, the times in turns."""
    vae = models_of(args)
    given, ways = given_of(args, vae, direction, frames), _ways(args, vae, direction, frames)
    device = torch.device(args.device)
    wanted = ways[0].run(vae, direction, given)
    made = [way.run(vae, direction, given) for way in ways]
    calls: dict[str, Callable[[], object]] = {
        way.name: (lambda way=way: way.run(vae, direction, given)) for way in ways
    }
    samples = alternate(calls, device, repeats=args.repeats, warm_ups=0)
    tiles = [way.plan for way in ways if way.name.startswith("official")][-1]
    shape = LatentShape(*(given.shape if direction == "decode" else wanted.shape))
    return [
        Row(
            direction, f"{args.size}x{frames}", way.name,
            1 / ratio(samples[ways[0].name], samples[way.name])["ratio_cpu"], samples[way.name].median,
            peak_in_child(args, direction, frames, number), psnr(found, wanted),
            seams(found, wanted, tiles, shape, direction, vae),
        )
        for number, (way, found) in enumerate(zip(ways, made, strict=True))
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ["", "clip", "way", "CPU time to untiled", "seconds", "peak MiB", "PSNR", "seams"]
    lines = [
        [row.direction, row.clip, row.way, f"{row.times_as_long:.2f}", f"{row.seconds:.2f}", f"{row.peak_mib:.0f}"]
        + (["", ""] if row.way == "untiled" else [f"{row.psnr:.1f} dB", f"{row.seams:.2f}"])
        for row in rows
    ]
    return markdown([head, *lines])


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the first of them the head."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def flat_table(args: argparse.Namespace) -> str:
    """Peak memory over the number of frames, untiled and streamed."""
    lines = [["frames", "pixels MiB", *(f"{d} {way} MiB" for d in DIRECTIONS for way in ("untiled", "streamed"))]]
    height, width = (int(side) for side in args.size.split("x"))
    args.budgets = []
    for frames in args.flat:
        peaks = [peak_in_child(args, direction, frames, number) for direction in DIRECTIONS for number in (0, 1)]
        lines.append([str(frames), f"{frames * height * width * 12 / 2**20:.0f}", *(f"{peak:.0f}" for peak in peaks)])
    return markdown(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--weights", choices=("nano", "wide"), default="nano")
    found.add_argument("--size", default="128x192", help="HEIGHTxWIDTH in pixels")
    found.add_argument("--frames", type=int, nargs="+", default=[33])
    found.add_argument("--flat", type=int, nargs="+", help="only peak memory, for these numbers of frames")
    found.add_argument("--parts", type=int, default=2, help="official tiles on each side of a frame")
    found.add_argument("--budgets", type=float, nargs="*", default=[0.6, 0.3], help="shares of what untiled takes")
    found.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS))
    found.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--repeats", type=int, default=1)
    found.add_argument("--seed", type=int, default=1)
    found.add_argument("--out", type=Path, help="folder for vae.json")
    found.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Run what the options say."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args)
    if args.flat:
        return print(flat_table(args))
    rows = [row for frames in args.frames for direction in args.direction for row in compare(args, direction, frames)]
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "vae.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return None


if __name__ == "__main__":
    main()
