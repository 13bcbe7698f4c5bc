"""The VAE within a memory budget beside the untiled pass, the official tiles and diffusers' default ones.

    python -m benchmarks.vae --weights nano --size 96x128 256x256 --frames 33 121 --out runs/vae
    python -m benchmarks.vae --weights wide --size 48x48 --frames 25 49 --parts 1 --peaks same --plot vae.png
    python -m benchmarks.vae --weights nano --size 128x192 --flat 17 33 65 129

Weights: Nano's trained ones, or random ones of the released width. All ways of one clip take turns in one process. Peak
memory is that of a process for each way, or with `--peaks same` of the timed run, which saves running everything twice.
PSNR and seams are to the untiled pass in fp32: the seam figure is the error's jump where the official tiles meet, in
time and space, over its jump elsewhere (1: no seams). Every row is printed as soon as it is measured; with --out the
rows are kept, and a clip that lies there already is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.vae_page import HEAD, Row, markdown, plot
from benchmarks.vae_ways import DIFFUSERS, OFFICIAL, UNTILED, Way, planned, psnr, seams, untiled, ways_of
from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.timing import Samples, timed
from kandinsky5_core.config import HUNYUAN_VAE
from kandinsky5_core.loading import load
from kandinsky5_core.nano.drawing import random_clip
from kandinsky5_core.shapes import LatentShape
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.stream_plan import StreamPlan
from kandinsky5_core.vae.tile_plan import latents_of_pixels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIRECTIONS = ("encode", "decode")


def models_of(args: argparse.Namespace) -> HunyuanVAE:
    """The weights that are asked for, in fp32."""
    if args.weights == "nano":
        vae = load("nano-video").vae
    else:
        torch.manual_seed(args.seed)
        vae = HunyuanVAE(HUNYUAN_VAE)
    return vae.to(args.device, torch.float32).eval().requires_grad_(False)


def given_of(args: argparse.Namespace, vae: HunyuanVAE, direction: str, size: str, frames: int) -> Tensor:
    """A drawn clip as pixels, or its latents (of random weights, and to measure memory, noise), (1, C, F, H, W)."""
    height, width = (int(side) for side in size.split("x"))
    _, drawn = random_clip(random.Random(args.seed), frames, (height, width))
    pixels = (drawn * 2 - 1).permute(3, 0, 1, 2)[None].to(args.device)
    if direction == "encode":
        return pixels
    if args.weights == "nano" and args.child is None:
        return untiled(vae, "encode", pixels)
    shape = latents_of_pixels(pixels.shape, vae.config)
    return torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)


def shape_of(vae: HunyuanVAE, size: str, frames: int) -> LatentShape:
    """The latents of a clip."""
    return latents_of_pixels((1, 3, frames, *(int(side) for side in size.split("x"))), vae.config)


def peak_in_child(args: argparse.Namespace, direction: str, size: str, frames: int, number: int) -> float:
    """MiB that a way's pass adds, measured in a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.vae", "--child", direction, size, str(frames), str(number)]
    for name in ("weights", "dtype", "device", "seed", "threads", "parts"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--budgets", *map(str, args.budgets), *(["--flat", "1"] if args.flat else [])]
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(found.stdout.splitlines()[-1])["added_bytes"] / 2**20


def child(args: argparse.Namespace) -> None:
    """One way's peak, as JSON."""
    direction, size, frames, number = args.child[0], args.child[1], int(args.child[2]), int(args.child[3])
    vae, dtype = models_of(args), DTYPES[args.dtype]
    given = given_of(args, vae, direction, size, frames).to(dtype)
    vae, shape = vae.to(dtype), shape_of(vae, size, frames)
    ways = flat_ways(vae, direction, shape) if args.flat else ways_of(
        vae, direction, shape, dtype, args.parts, args.budgets
    )  # fmt: skip
    warm_up(vae, direction, given)
    print(json.dumps(peak_of(lambda: ways[number].run(given), torch.device(args.device))))


def warm_up(vae: HunyuanVAE, direction: str, given: Tensor) -> None:
    """What the libraries do once, on a small piece."""
    untiled(vae, direction, given[:, :, :1, :8, :8] if direction == "decode" else given[:, :, :1, :64, :64])


def flat_ways(vae: HunyuanVAE, direction: str, shape: LatentShape) -> list[Way]:
    """Untiled, and one streaming plan whatever the length."""
    plan = StreamPlan(
        exact_levels=1, frames=4, height=shape.height, width=shape.width, windows=1, window_height=shape.height,
        window_width=shape.width,
    )  # fmt: skip
    plain = Way(kind=UNTILED, name="untiled", run=lambda given: untiled(vae, direction, given))
    return [plain, planned(vae, direction, "ours", "streamed", plan)]


def compare(args: argparse.Namespace, vae: HunyuanVAE, direction: str, size: str, frames: int) -> list[Row]:
    """All ways over one clip in turns; prints each row when its figures are complete."""
    dtype, shape = DTYPES[args.dtype], shape_of(vae, size, frames)
    given = given_of(args, vae, direction, size, frames)
    wanted = untiled(vae, direction, given) if dtype != torch.float32 else None
    vae, given = vae.to(dtype), given.to(dtype)
    ways = ways_of(vae, direction, shape, dtype, args.parts, args.budgets)
    tiles = [way.plan for way in ways if way.kind == OFFICIAL][-1]
    samples, rows = {way.name: Samples() for way in ways}, []
    warm_up(vae, direction, given)
    for repeat, (number, way) in product(range(args.repeats), enumerate(ways)):
        made, added = measured(way, given, samples[way.name])
        if way.kind == UNTILED and wanted is None:
            wanted = made
        if repeat + 1 < args.repeats:
            continue
        exact = made is wanted
        done = [other for other in reversed(ways) if samples[other.name].cpu_seconds]
        cpu = {other.kind: samples[other.name].cpu_median for other in done}
        own, rival = samples[way.name].cpu_median, way.kind not in (UNTILED, OFFICIAL, DIFFUSERS)
        rows.append(
            Row(
                direction=direction, size=size, frames=frames, kind=way.kind, way=way.name,
                seconds=samples[way.name].median, cpu_seconds=own, to_untiled=own / cpu[UNTILED],
                as_official=cpu[OFFICIAL] / own if rival else None,
                as_diffusers=cpu[DIFFUSERS] / own if rival else None,
                peak_mib=added if args.peaks == "same" else peak_in_child(args, direction, size, frames, number),
                budget_mib=way.budget_mib, psnr=None if exact else psnr(made, wanted),
                seams=None if exact else seams(made, wanted, tiles, shape, direction, vae),
            )
        )  # fmt: skip
        print("| " + " | ".join(rows[-1].cells()) + " |", flush=True)
    vae.float()
    return rows


def measured(way: Way, given: Tensor, samples: Samples) -> tuple[Tensor, float]:
    """A way's result and the MiB that it added; its times go to `samples`."""
    made: list[Tensor] = []

    def run() -> None:
        wall, cpu = timed(lambda: made.append(way.run(given)), given.device)
        samples.seconds.append(wall), samples.cpu_seconds.append(cpu)

    if sys.platform == "linux":
        # What earlier runs have freed would be used again and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
    added = peak_of(run, given.device)["added_bytes"]
    return made[0], (added or 0) / 2**20


def table(rows: list[Row]) -> str:
    """Markdown."""
    return markdown([HEAD, *(row.cells() for row in rows)])


def flat_table(args: argparse.Namespace) -> str:
    """Peak memory over the number of frames, untiled and streamed."""
    lines = [["frames", "pixels MiB", *(f"{d} {way} MiB" for d in DIRECTIONS for way in ("untiled", "streamed"))]]
    size = args.size[0]
    height, width = (int(side) for side in size.split("x"))
    for frames in args.flat:
        peaks = [peak_in_child(args, direction, size, frames, number) for direction in DIRECTIONS for number in (0, 1)]
        lines.append([str(frames), f"{frames * height * width * 12 / 2**20:.0f}", *(f"{peak:.0f}" for peak in peaks)])
    return markdown(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--weights", choices=("nano", "wide"), default="nano")
    found.add_argument("--size", nargs="+", default=["128x192"], help="HEIGHTxWIDTH in pixels")
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
    found.add_argument("--peaks", choices=("own", "same"), default="own", help="of a process of its own, or as timed")
    found.add_argument("--out", type=Path, help="folder for the figures")
    found.add_argument("--plot", type=Path, help="picture of them over the number of frames")
    found.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Run what the options say."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args)
    if args.flat:
        return print(flat_table(args))
    vae, rows = models_of(args), []
    for size, frames, direction in product(args.size, args.frames, args.direction):
        rows += kept(args, vae, direction, size, frames)
    print(f"\n{table(rows)}")
    if args.plot:
        plot(rows, args.plot)
    return None


def kept(args: argparse.Namespace, vae: HunyuanVAE, direction: str, size: str, frames: int) -> list[Row]:
    """The rows of one clip, from the folder where they lie there."""
    if args.out is None:
        return compare(args, vae, direction, size, frames)
    what = (args.weights, args.dtype, size, str(frames), direction, f"parts{args.parts}", f"seed{args.seed}")
    path = args.out / f"vae-{'-'.join(what)}.json"
    if path.exists():
        return [Row(**row) for row in json.loads(path.read_text())]
    rows = compare(args, vae, direction, size, frames)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
