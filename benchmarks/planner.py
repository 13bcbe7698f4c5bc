"""What `kandinsky5 plan` predicts beside what is measured, as a Markdown table.

    python -m benchmarks.planner
    python -m benchmarks.planner --process

Bytes of live tensors are counted, so the first table is the same on every machine but for the version of PyTorch. With
--process it is the peak of a process on a CPU, each case in one of its own.
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

from kandinsky5_core.bench.planned import Compared, every_case, process_cases, table


def in_processes() -> Iterator[Compared]:
    """Each case measured in a process that does nothing else."""
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for number in range(len(process_cases())):
        command = [sys.executable, "-m", "benchmarks.planner", "--child", str(number)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        yield Compared(**json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    """Print a table, or as a child one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", action="store_true", help="the peak of a process")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        torch.set_num_threads(1)
        print(json.dumps(asdict(process_cases()[args.child]())))
        return
    for line in table(in_processes() if args.process else every_case()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
