"""Everything a GPU is needed for, in one go and within a stated time.

    python -m benchmarks.gpu --out runs/gpu                 # on the card, 500 seconds
    python -m benchmarks.gpu --out runs/gpu --only dit nabla --budget 300
    python -m benchmarks.gpu --out runs/tiny --device cpu --tiny    # rehearses every stage's code

The stages come in the order of their weight, each in a process of its own with a time of its own. `gpu.json` and
`gpu.md` in --out are written anew with every figure, so a run that is cut keeps what it had; `gpu.log` holds what the
processes printed. Weights are random, at full width. diffusers and torchao are used where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.summary import markdown

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5
ENDING_SECONDS = 5
"""Of the budget, kept for the summary."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process's work."""

    title: str
    most: int
    """Seconds after which it is ended."""
    least: int = 30
    """Seconds without which it is not begun."""


STAGES = {
    "dit": Stage(title="a step of Video Lite, 5 s, beside diffusers", most=200, least=40),
    "nabla": Stage(title="a step of Video Lite, 10 s, NABLA beside dense", most=240, least=60),
    "engines": Stage(title="engines for dense attention side by side", most=90),
    "vae": Stage(title="the VAE within budgets", most=160, least=40),
    "swap": Stage(title="blocks that wait in CPU memory", most=60),
    "quant": Stage(title="weights in eight bits", most=60),
    "pro": Stage(title="a step of Video Pro (19B), 5 s", most=90),
    "image": Stage(title="a step of Image Lite, beside diffusers", most=45, least=20),
    "load": Stage(title="a file of weights to the device", most=60, least=25),
    "text": Stage(title="the text encoder", most=60, least=25),
}


def main(argv: list[str] | None = None) -> int:
    """Run the stages, or as a child one of them."""
    args = parser().parse_args(argv)
    if args.child:
        return child(args)
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("--device cpu can only rehearse: add --tiny")
    args.out = args.out.resolve()
    unknown = [name for name in args.only or () if name not in STAGES]
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is no stage; use {', '.join(STAGES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").write_text("", encoding="utf-8")
    report: dict[str, Any] = {
        "options": " ".join(argv if argv is not None else sys.argv[1:]), "rehearsal": args.tiny, "machine": {},
        "note": "A rehearsal: tiny sizes, whose figures say nothing." if args.tiny else "", "stages": {},
    }  # fmt: skip
    ends = time.monotonic() + args.budget - ENDING_SECONDS
    for name in args.only or STAGES:
        report["stages"][name] = {"title": STAGES[name].title, "status": "running"}
        run_stage(name, args, report, ends)
        keep(report, args.out)
    print(markdown(report))
    whole = [stage["status"] in ("done", "not begun") and not errors_of(stage) for stage in report["stages"].values()]
    return 0 if all(whole) else 1


def errors_of(entry: dict[str, Any]) -> dict[str, str]:
    """What failed in a stage, by what it was."""
    return (entry.get("found") or {}).get("errors", {})


def run_stage(name: str, args: argparse.Namespace, report: dict[str, Any], ends: float) -> None:
    """One stage in a process of its own; its notes go into the report as they come."""
    stage, entry, began = STAGES[name], report["stages"][name], time.monotonic()
    seconds = min(stage.most * args.patience, ends - began)
    if seconds < stage.least:
        entry |= {"status": "not begun", "why": f"{max(0.0, ends - began):.0f} s were left, it takes {stage.least}"}
        return
    with tempfile.TemporaryDirectory() as folder, (args.out / "gpu.log").open("a", encoding="utf-8") as log:
        path = Path(folder) / "notes.json"
        log.write(f"\n--- {name}\n")
        log.flush()
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, str(path), "--seconds", f"{seconds:.0f}",
                   "--device", args.device, "--out", str(args.out), *(["--tiny"] if args.tiny else [])]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(), cwd=ROOT
        )
        follow(process, path, seconds, report, entry, args.out)
    entry["seconds"] = round(time.monotonic() - began, 1)
    print(f"{name}: {entry['status']} after {entry['seconds']} s {entry.get('why', '')}", file=sys.stderr, flush=True)


def follow(
    process: subprocess.Popen[bytes], path: Path, seconds: float, report: dict[str, Any], entry: dict[str, Any],
    out: Path,
) -> None:  # fmt: skip
    """Wait for a stage and take over its notes; it is ended when its time is up, or this process is stopped."""
    ends, seen = time.monotonic() + seconds, None
    try:
        while process.poll() is None and time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
            if (now := stamp(path)) != seen:
                seen = now
                take_notes(path, report, entry)
                keep(report, out)
    finally:
        late = process.poll() is None
        if late:
            process.kill()
        process.wait()
    take_notes(path, report, entry)
    if late:
        entry |= {"status": "cut", "why": f"its {seconds:.0f} s were over"}
    elif process.returncode:
        error = errors_of(entry).get("the stage")
        entry |= {"status": "failed", "why": error or f"exit code {process.returncode}; see gpu.log"}
    else:
        entry["status"] = "done"


def stamp(path: Path) -> int | None:
    """When a file was last written."""
    return path.stat().st_mtime_ns if path.exists() else None


def take_notes(path: Path, report: dict[str, Any], entry: dict[str, Any]) -> None:
    """A stage's notes, and with the first of them what they were measured on."""
    if path.exists():
        entry["found"] = json.loads(path.read_text(encoding="utf-8"))
        report["machine"] = entry["found"]["facts"].pop("machine", None) or report["machine"]


def keep(report: dict[str, Any], out: Path) -> None:
    """Write both files anew."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(markdown(report), encoding="utf-8")


def environment() -> dict[str, str]:
    """Of a stage: nothing is asked of a network, and what it prints is there at once."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def child(args: argparse.Namespace) -> int:
    """One stage: its notes go to a file."""
    name, path = args.child
    from benchmarks.gpu_parts.notes import Notes

    notes = Notes(Path(path), args.seconds)
    done = notes.attempt("the stage", lambda: measure(name, args, notes) or True)
    return 0 if done else 1


def measure(name: str, args: argparse.Namespace, notes: Any) -> None:
    """Run a stage's function without gradients."""
    import torch

    from benchmarks.gpu_parts import others, steps
    from benchmarks.gpu_parts.subject import FULL, TINY, Given
    from kandinsky5_core.bench.machine import facts
    from kandinsky5_core.loading import check_device, resolve_dtype

    device = check_device(args.device)
    given = Given(
        device=device, dtype=resolve_dtype(None, device), sizes=TINY if args.tiny else FULL, tiny=args.tiny
    )  # fmt: skip
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Some packages' kernels run on the current device.
    if args.tiny:
        torch.set_num_threads(1)  # What is so small gains nothing from more.
    notes.fact("machine", facts(device, given.dtype))
    functions: dict[str, Callable[[Given, Any], None]] = {
        "dit": steps.dit_stage, "nabla": steps.nabla_stage, "engines": steps.engines_stage, "vae": others.vae_stage,
        "swap": steps.swap_stage, "quant": steps.quant_stage, "pro": steps.pro_stage, "image": steps.image_stage,
        "load": others.load_stage, "text": others.text_stage,
    }  # fmt: skip
    with torch.no_grad():
        functions[name](given, notes)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and gpu.log")
    found.add_argument("--device", default="cuda")
    found.add_argument("--budget", type=float, default=500, help="seconds for everything (default 500)")
    found.add_argument("--only", nargs="+", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    found.add_argument("--tiny", action="store_true", help="tiny sizes: rehearse the code, on a CPU too")
    found.add_argument("--patience", type=float, default=1.0, help="times the seconds that a stage may take")
    found.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    found.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    # So that a stage is ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
