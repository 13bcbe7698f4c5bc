"""What a step cache saves and what it costs, on the embedded models.

    python -m benchmarks.step_cache --n 40 --out runs/step-cache

Every setting samples the same cases from the same noise as the uncached run, one after the other in each batch, so that
the times stand side by side. Prints a table; writes step_cache.json and, where matplotlib is there, step_cache.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.loading import load
from kandinsky5_core.nano.cases import CASES, Case
from kandinsky5_core.nano.judge import psnr
from kandinsky5_core.nano.score import Rows, decode_rows, encode_rows, sample_rows
from kandinsky5_core.pipeline import Models
from kandinsky5_core.request import Request
from kandinsky5_core.sampling.step_cache import CacheCounts, CacheRatios, MagCache, MagSettings
from kandinsky5_core.weights.cache_ratios import find_ratios

TASKS = ("t2v", "i2v", "t2i", "i2i")
THRESHOLDS = (0.0, 0.03, 0.06, 0.12, 0.24)
MAX_SKIPS = (2, 4)


@dataclass
class Measured:
    """One setting over all cases of a task."""

    settings: MagSettings | None
    """None without a cache."""
    counts: CacheCounts = field(default_factory=CacheCounts)
    seconds: list[float] = field(default_factory=list)
    """Of sampling, for each batch."""
    cpu_seconds: list[float] = field(default_factory=list)
    """The same without what else the machine does; exact on one thread."""
    scores: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)
    """To the uncached frames of the same case, in dB."""

    def row(self, plain: Measured) -> dict[str, object]:
        """The figures of the table."""
        score, plain_score = statistics.mean(self.scores), statistics.mean(plain.scores)
        return {
            "threshold": None if self.settings is None else self.settings.threshold,
            "max_skip": None if self.settings is None else self.settings.max_skip,
            "retain": None if self.settings is None else self.settings.retain,
            "skipped_share": round(self.counts.share, 3),
            "times_as_fast": _ratio(plain.seconds, self.seconds),
            "times_as_fast_cpu": _ratio(plain.cpu_seconds, self.cpu_seconds),
            "psnr": round(statistics.mean(self.psnrs), 1) if self.psnrs else None,
            "score": round(score, 3),
            "of_plain_score": round(score / plain_score, 3) if plain_score else None,
        }


def _ratio(before: list[float], now: list[float]) -> float:
    """Median over the batches of old time by new time."""
    return round(statistics.median(old / new for old, new in zip(before, now, strict=True)), 2)


def measure(models: Models, ratios: CacheRatios, task: str, grid: list[MagSettings], args: argparse.Namespace) -> list:
    """Rows of the table for one task, the first without a cache."""
    rng = random.Random(f"score-{args.seed}-{task}")
    cases = [CASES[task][1](rng, models.variant) for _ in range(args.n)]
    cases.sort(key=lambda case: (case.request.height or 0, case.request.width or 0))
    measured = [Measured(None), *(Measured(settings) for settings in grid)]
    groups: list[list[Case]] = []
    for case in cases:
        same = groups and len(groups[-1]) < args.batch and _size(groups[-1][0]) == _size(case)
        groups[-1].append(case) if same else groups.append([case])
    for number, group in enumerate(groups):
        requests = [_seeded(case, args.seed * 100_003 + number * args.batch + row) for row, case in enumerate(group)]
        _measure_batch(models, ratios, measured, encode_rows(models, requests), group)
        print(f"{task}: {number + 1} of {len(groups)} batches", flush=True)
    return [entry.row(measured[0]) for entry in measured]


def _measure_batch(
    models: Models, ratios: CacheRatios, measured: list[Measured], rows: Rows, group: list[Case]
) -> None:
    sample_rows(models, rows)  # warms up
    plain: list[Tensor] = []
    made_by = [_timed(models, ratios, entry, rows) for entry in measured]
    for entry, latents in zip(measured, made_by, strict=True):
        frames = decode_rows(models, rows, latents)
        plain = plain or frames
        for case, made, uncached in zip(group, frames, plain, strict=True):
            entry.scores.append(case.judge(made)["all"])
            if entry.settings is not None:
                entry.psnrs.append(min(psnr(made, uncached), 100.0))


def _timed(models: Models, ratios: CacheRatios, entry: Measured, rows: Rows) -> Tensor:
    def start(sigmas: list[float]) -> MagCache:
        return MagCache(ratios, entry.settings, sigmas, entry.counts)

    began, began_cpu = time.perf_counter(), time.process_time()
    latents = sample_rows(models, rows, None if entry.settings is None else start)
    entry.cpu_seconds.append(time.process_time() - began_cpu)
    entry.seconds.append(time.perf_counter() - began)
    return latents


def _size(case: Case) -> tuple[int | None, int | None]:
    return case.request.height, case.request.width


def _seeded(case: Case, seed: int) -> Request:
    return replace(case.request, seed=seed)


def table(rows: list[dict[str, object]]) -> str:
    """The rows of one task as Markdown."""
    head = (
        "| threshold | max skip | retain | skipped | times as fast | by CPU time | PSNR to uncached | score "
        "| of uncached |"
    )
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        cells = [
            "off" if row["threshold"] is None else f"{row['threshold']:g}", row["max_skip"] or "",
            row["retain"] or "", f"{100 * row['skipped_share']:.0f} %",
            f"{row['times_as_fast']:.2f}", f"{row['times_as_fast_cpu']:.2f}",
            "" if row["psnr"] is None else f"{row['psnr']:.1f} dB", f"{row['score']:.3f}",
            "" if row["of_plain_score"] is None else f"{row['of_plain_score']:.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Speed, PSNR and score over the threshold, a line for each task and max_skip."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for task, rows in found.items():
        for max_skip in sorted({row["max_skip"] for row in rows if row["max_skip"]}):
            line = [row for row in rows if row["max_skip"] == max_skip]
            for axis, key in zip(axes, ("times_as_fast_cpu", "psnr", "of_plain_score"), strict=True):
                points = [(row["threshold"], row[key]) for row in line if key != "psnr" or row["skipped_share"]]
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{task}, max skip {max_skip}")
    names = ("times as fast (sampling, CPU time)", "PSNR to uncached, dB", "score, of uncached")
    for axis, name in zip(axes, names, strict=True):
        axis.set(xlabel="threshold", title=name)
        axis.grid(alpha=0.3)
    axes[0].axhline(1.4, color="grey", linestyle=":")
    axes[2].axhline(0.97, color="grey", linestyle=":")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40, help="cases a task (default 40)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    parser.add_argument("--max-skips", nargs="+", type=int, default=list(MAX_SKIPS))
    parser.add_argument("--retain", type=float, default=MagSettings.retain)
    parser.add_argument("--out", type=Path, default=Path("runs/step-cache"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    grid = [
        MagSettings(threshold=threshold, max_skip=max_skip, retain=args.retain)
        for max_skip in args.max_skips
        for threshold in args.thresholds
    ]
    found: dict[str, list[dict[str, object]]] = {}
    for task in args.tasks:
        models = load(CASES[task][0])
        found[task] = measure(models, find_ratios(models.variant, models.weights), task, grid, args)
        print(f"\n{task} ({models.variant.name}, n {args.n}, seed {args.seed})\n\n{table(found[task])}\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "threads": args.threads, "n": args.n, "seed": args.seed, "batch": args.batch}
    (args.out / "step_cache.json").write_text(json.dumps({**facts, "tasks": found}, indent=1) + "\n")
    plot(found, args.out / "step_cache.png")


if __name__ == "__main__":
    main()
