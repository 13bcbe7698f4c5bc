"""Training jobs that train nothing: folders as train/jobs.py describes, and a process that keeps one moving.

As a program, `python -m tests.nodes.fake_jobs JOB_FOLDER SECONDS_A_STEP`, it holds the job's lock and writes steps until STOP.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from train.config import DataConfig, FitConfig, JobConfig, LoraConfig, SampleConfig, SourceConfig, ValidationConfig
from train.jobs import LOG, PROGRESS, SAMPLES, Job, Jobs, Status

PACK = Path(__file__).parents[2]
PROMPTS = ("a red star moves left", "a blue star stays still")
COLOURS = ("crimson", "royalblue", "gold", "seagreen")


def job_config(name: str, *, num_steps: int = 500, prompts: Sequence[str] = PROMPTS, source: str = "") -> JobConfig:
    """Settings of a small LoRA; its material is not there unless given."""
    return JobConfig(
        name=name, model="nano-video", data=DataConfig(sources=(SourceConfig(path=source or "/no/such/folder"),)),
        lora=LoraConfig(rank=8, alpha=8.0), fit=FitConfig(num_steps=num_steps, learning_rate=1e-3),
        validation=ValidationConfig(every=100, samples=tuple(SampleConfig(prompt=prompt) for prompt in prompts)),
        device="cpu", threads=1,
    )  # fmt: skip


def make_job(jobs: Path, name: str, *, steps: int = 0, sample_every: int = 0, config: JobConfig | None = None,
             **status: Any) -> Job:  # fmt: skip
    """A job's folder as after so many steps, stopped unless `status` says otherwise."""
    job = Jobs(jobs).create(config or job_config(name))
    write_steps(job, 1, steps)
    for step in range(sample_every, steps + 1, sample_every) if sample_every else ():
        write_samples(job, step)
    (job.folder / LOG).write_text(f"12:00:00 loading\n12:00:02 training {name}\n", encoding="utf-8")
    values: dict[str, Any] = {"state": "stopped", "step": steps, "num_steps": 500, "loss": loss_at(steps), "best_loss": 1.1 * loss_at(steps) if steps >= 50 else None, **status}
    job.write_status(Status(updated=time.time(), **values))
    return job


def loss_at(step: int) -> float:
    """Smooth and falling."""
    return 0.08 + 0.9 * math.exp(-step / 120)


def record(step: int, every: int = 50) -> dict[str, float]:
    """A line of progress."""
    smoothed = loss_at(step)
    noise = random.Random(step).gauss(0, 0.12)
    line = {"step": step, "loss": smoothed * math.exp(noise), "smoothed": smoothed, "rate": 1e-3, "grad_norm": 0.7,
            "seconds": 0.1}  # fmt: skip
    return {**line, "validation": smoothed * 1.1} if step % every == 0 else line


def write_steps(job: Job, first: int, last: int) -> None:
    """Lines of those steps."""
    with (job.folder / PROGRESS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record(step)) + "\n" for step in range(first, last + 1))


def write_samples(job: Job, step: int, count: int = len(PROMPTS)) -> Path:
    """One-coloured pictures; the folder."""
    folder = job.folder / SAMPLES / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (96, 64), COLOURS[number % len(COLOURS)]).save(folder / f"{number:02d}.png")
    return folder


class FakeRun:
    """The process of a job; a context manager that ends it."""

    def __init__(self, job: Job, seconds: float = 0.05) -> None:
        self.job, self.seconds = job, seconds

    def __enter__(self) -> FakeRun:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nodes.fake_jobs", str(self.job.folder), str(self.seconds)], cwd=PACK
        )
        self.wait(lambda: self.job.is_alive() and self.job.read_status().step > 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, condition: Any, seconds: float = 120) -> None:
        """Until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.job.read_status()
            time.sleep(0.05)


def main(folder: str, seconds: str) -> int:
    """Hold the lock and write steps until STOP or the last one."""
    job = Job(Path(folder))
    status = replace(job.read_status(), state="training", pid=0)
    total = status.num_steps or 500
    with job.locked(), (job.folder / LOG).open("a", encoding="utf-8") as log:
        for step in range(status.step + 1, total + 1):
            write_steps(job, step, step)
            if step % 25 == 0:
                log.write(f"step {step} of {total}, loss {loss_at(step):.4f}\n")
                log.flush()
            left = (total - step) * float(seconds)
            status = replace(status, step=step, loss=loss_at(step), seconds_left=left, seconds=step * float(seconds),
                             peak_bytes=6 << 28, updated=time.time())  # fmt: skip
            job.write_status(status)
            if job.stop_wanted():
                job.write_status(replace(status, state="stopped", message="stopped on request", seconds_left=None))
                return 3
            time.sleep(float(seconds))
        job.write_status(replace(status, state="done", message="", seconds_left=0.0))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
