"""What `kandinsky5 plan` predicts beside what is measured, as a Markdown table.

    python -m benchmarks.planner
    python -m benchmarks.planner --process
    python -m benchmarks.planner --against diffusers

Bytes of live tensors are counted, so the first table is the same on every machine but for the version of PyTorch. With
--process it is the peak of a process on a CPU, each case in one of its own. --against diffusers counts a step of its
DiT beside ours, dense, at the sizes that the models were made for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from kandinsky5_core.bench.planned import (
    FULL_SIZES,
    Compared,
    every_case,
    full_step,
    full_step_of_diffusers,
    process_cases,
    table,
)  # fmt: skip
from kandinsky5_core.config import variant


def in_processes() -> Iterator[Compared]:
    """Each case measured in a process that does nothing else."""
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for number in range(len(process_cases())):
        command = [sys.executable, "-m", "benchmarks.planner", "--child", str(number)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        yield Compared(**json.loads(found.stdout.splitlines()[-1]))


def beside_diffusers() -> Iterator[str]:
    """Lines of a table: what a step of each DiT holds beside its weights."""
    yield from ("| step | ours MiB | diffusers MiB | times as much |", "|---|---|---|---|")
    for name in (name for name in FULL_SIZES if variant(name).nabla is None):
        ours, theirs = full_step(name), full_step_of_diffusers(name)
        sizes = (ours.measured / 2**20, theirs / 2**20, theirs / ours.measured)
        yield f"| {ours.what} | {sizes[0]:.0f} | {sizes[1]:.0f} | {sizes[2]:.2f} |"


def main() -> None:
    """Print a table, or as a child one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", action="store_true", help="the peak of a process")
    parser.add_argument("--against", choices=("diffusers",), help="its DiT beside ours")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        torch.set_num_threads(1)
        print(json.dumps(asdict(process_cases()[args.child]())))
        return
    for line in beside_diffusers() if args.against else table(in_processes() if args.process else every_case()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
