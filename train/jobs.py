"""Training jobs as folders: the contract between the child process that trains and whoever watches it.

    <jobs>/<id>/job.json          the JobConfig
                status.json       a Status, written aside and renamed
                progress.jsonl    a line a step
                scan.txt          what the material came to
                log.txt           everything the process printed
                STOP              asks it to save and end
                lock              locked by the process for as long as it lives
                checkpoints/ samples/ result/ tensorboard/ cache/

No sockets and no shared memory: jobs survive a restart of ComfyUI, and a watcher finds one that was killed by its
lock, which the system frees whatever happens. Standard library only, so that nodes can import it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .config import JobConfig, from_dict, to_dict

JOB, STATUS, PROGRESS, LOG, STOP, LOCK = "job.json", "status.json", "progress.jsonl", "log.txt", "STOP", "lock"
SCAN = "scan.txt"
CHECKPOINTS, SAMPLES, RESULT, TENSORBOARD, CACHE = "checkpoints", "samples", "result", "tensorboard", "cache"
RUNNING = ("starting", "waiting", "loading", "caching", "training", "saving")
ENDED = ("done", "stopped", "failed", "lost")
EXIT_CODES = {"done": 0, "failed": 1, "stopped": 3}
ENDING_SECONDS, MOMENT = 10.0, 0.5
"""That a process may take to go after it has told its end, and that a look at the lock may hold it."""
START_SECONDS = 120.0
"""A process that has not taken its lock by then did not come up."""
PACK = Path(__file__).parents[1]
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
_PICTURES = (".png", ".mp4")


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a job stands."""

    state: str
    """One of `RUNNING` or `ENDED`."""
    step: int = 0
    num_steps: int = 0
    message: str = ""
    """What happens now, or why the job ended."""
    loss: float | None = None
    """Smoothed."""
    best_loss: float | None = None
    """Lowest validation loss."""
    seconds: float = 0.0
    """Training time of this start."""
    seconds_left: float | None = None
    peak_bytes: int = 0
    """Peak of the process's memory, on the accelerator where it trains on one."""
    result: str = ""
    """File of the result, once written."""
    pid: int = 0
    updated: float = 0.0
    """Unix time."""

    @property
    def running(self) -> bool:
        """The process lives, as far as this status knows."""
        return self.state in RUNNING


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` at once: a reader sees the old file or the new, never half of one."""
    aside = path.with_suffix(path.suffix + ".partial")
    try:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Job:
    """One job's folder."""

    folder: Path

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def config(self) -> JobConfig:
        """What is trained.

        Raises:
            ValueError: job.json is missing or wrong.
        """
        path = self.folder / JOB
        try:
            return from_dict(JobConfig, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"{self.folder} holds no {JOB}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def status(self) -> Status:
        """Where it stands. A job whose process is gone without having said so is marked 'lost'."""
        status = self.read_status()
        if not status.running or self.is_alive():
            return status
        if status.state == "starting" and time.time() - status.updated < START_SECONDS:
            return status
        # It may have ended between the two looks.
        status = self.read_status()
        if not status.running:
            return status
        where = f"after step {status.step}" if status.step else "before its first step"
        lost = dataclasses.replace(
            status, state="lost", updated=time.time(), seconds_left=None,
            message=f"the process ended {where} without a word (killed, crash or power); resume goes on from the last "
            "checkpoint",
        )  # fmt: skip
        self.write_status(lost)
        return lost

    def read_status(self) -> Status:
        """status.json as it stands."""
        try:
            values = json.loads((self.folder / STATUS).read_text(encoding="utf-8"))
            return from_dict(Status, values)
        except FileNotFoundError:
            return Status(state="stopped", message="not started yet")
        except ValueError as error:
            return Status(state="failed", message=f"{STATUS} cannot be read: {error}")

    def write_status(self, status: Status) -> None:
        """Replace status.json."""
        write_json(self.folder / STATUS, dataclasses.asdict(status))

    def progress(self, after: int = 0) -> list[dict[str, float]]:
        """Records of the steps after step `after`, in order; of a step made twice around a resume, the later one."""
        found: dict[int, dict[str, float]] = {}
        with contextlib.suppress(FileNotFoundError), (self.folder / PROGRESS).open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut off by a crash
                    record = json.loads(line)
                    if record["step"] > after:
                        found[int(record["step"])] = record
        return [found[step] for step in sorted(found)]

    def samples(self) -> list[tuple[int, list[Path]]]:
        """(step, files) of the samples made so far, in order."""
        found = []
        for folder in (self.folder / SAMPLES).glob("step-*"):
            step = folder.name.removeprefix("step-")
            if step.isdecimal():  # else still being written
                files = sorted(file for file in folder.iterdir() if file.suffix in _PICTURES)
                found.append((int(step), files))
        return sorted(found)

    def scan_report(self) -> str:
        """What the material came to, for people; empty before it was looked at."""
        path = self.folder / SCAN
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def log_tail(self, num_bytes: int = 20_000) -> str:
        """The end of log.txt."""
        try:
            with (self.folder / LOG).open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - num_bytes))
                return log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def result(self) -> Path | None:
        """File of the result, if there is one."""
        told = self.read_status().result
        return Path(told) if told and Path(told).is_file() else None

    def stop(self) -> None:
        """Ask the process to save and end."""
        (self.folder / STOP).touch()

    def stop_wanted(self) -> bool:
        """Somebody asked."""
        return (self.folder / STOP).exists()

    def is_alive(self) -> bool:
        """A process holds the lock."""
        path = self.folder / LOCK
        if not path.exists():
            return False
        with path.open("a+b") as file:
            if not try_lock(file):
                return True
            unlock(file)
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock.

        Raises:
            ValueError: another process does.
        """
        with (self.folder / LOCK).open("a+b") as file:
            end = time.monotonic() + MOMENT
            while not try_lock(file):
                if time.monotonic() > end:
                    raise ValueError(f"job {self.id} is already running; stop it first, or wait for its end")
                time.sleep(0.02)
            try:
                yield
            finally:
                unlock(file)


@dataclass(frozen=True)
class Jobs:
    """All jobs below one folder."""

    folder: Path

    def all(self) -> list[Job]:
        """Newest first."""
        if not self.folder.is_dir():
            return []
        named = (entry for entry in self.folder.iterdir() if _ID.fullmatch(entry.name) and not entry.is_symlink())
        found = [Job(entry) for entry in named if (entry / JOB).is_file()]
        return sorted(found, key=lambda job: job.id, reverse=True)

    def get(self, job_id: str) -> Job:
        """The job with that id.

        Raises:
            ValueError: not the form of an id, or no such job.
        """
        if not isinstance(job_id, str) or not _ID.fullmatch(job_id):
            raise ValueError(f"'{job_id}' is not a job's id (small letters, digits, - and _)")
        folder = self.folder / job_id
        if folder.is_symlink() or not (folder / JOB).is_file():
            raise ValueError(f"there is no job '{job_id}'")
        return Job(folder)

    def create(self, config: JobConfig) -> Job:
        """A new folder with job.json, not started."""
        name = re.sub(r"[^a-z0-9_-]+", "-", config.name.lower()).strip("-_")[:40] or "training"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(1000):
            folder = self.folder / (f"{stamp}-{name}" + (f"-{number}" if number else ""))
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            write_json(folder / JOB, to_dict(config))
            return Job(folder)
        raise RuntimeError(f"{self.folder} has too many jobs of this second")

    def delete(self, job_id: str) -> None:
        """Remove a job that does not run, with its checkpoints and samples; a result written elsewhere stays.

        Raises:
            ValueError: it runs, or there is none.
        """
        job = self.get(job_id)
        if job.status().running:
            raise ValueError(f"job {job_id} is running; stop it first")
        shutil.rmtree(job.folder)


@contextlib.contextmanager
def device_turn(job: Job, device: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold a device for one job: of those in one folder, the others wait.

    Args:
        device: Its name; jobs with other names run at the same time.
        waiting: Called twice a second while another job has it; may raise to give up.
    """
    with (job.folder.parent / f".{device.replace(':', '-')}.lock").open("a+b") as file:
        while not try_lock(file):
            waiting(f"waits until another job has left {device}")
            time.sleep(0.5)
        try:
            yield
        finally:
            unlock(file)


def launch(job: Job, *, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> int:
    """Start, or go on with, a job as a process of its own; its pid.

    The process outlives this one: own process group, no standard input, output to log.txt.

    Args:
        environment: Set beside the inherited variables, without those that describe this process's own use of the
            accelerator (ComfyUI exports its allocator's settings).

    Raises:
        ValueError: it runs already, or job.json is wrong.
    """
    config = job.config()
    wait_for_end(job)
    (job.folder / STOP).unlink(missing_ok=True)
    before = job.read_status()
    job.write_status(Status(state="starting", step=before.step, num_steps=config.fit.num_steps, updated=time.time()))
    # The new group keeps a Ctrl-C in ComfyUI's terminal from ending the job.
    apart: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}  # type: ignore[attr-defined]
    with (job.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [python, "-u", "-m", Path(__file__).parent.name, "run", "--launched", str(job.folder / JOB)],
            cwd=PACK, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=_environment(config.device, environment or {}), **apart,
        )  # fmt: skip
    return process.pid


def wait_for_end(job: Job, patience: float = ENDING_SECONDS) -> None:
    """Until the process of a job that has told its end is gone, so that a stopped one can go on at once.

    Raises:
        ValueError: it runs.
    """
    began = time.monotonic()
    while job.is_alive():
        if time.monotonic() - began > (MOMENT if job.read_status().running else patience):
            raise ValueError(f"job {job.id} is already running")
        time.sleep(0.05)


def _environment(device: str, extra: Mapping[str, str]) -> dict[str, str]:
    dropped = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTHONSTARTUP")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    cards = visible_cards(device, kept)
    return {**kept, **cards, "PYTHONPATH": str(PACK), "PYTHONIOENCODING": "utf-8", **extra}


def visible_cards(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What 'cuda:N' sets: the process sees that card alone, as its first. Nothing for other devices.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES allows fewer cards.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    cards = visible.split(",") if visible else [str(card) for card in range(int(number) + 1)]
    if int(number) >= len(cards):
        raise ValueError(f"device '{device}' is beyond the {len(cards)} of CUDA_VISIBLE_DEVICES={visible}")
    return {"CUDA_VISIBLE_DEVICES": cards[int(number)]}


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file for as long as it stays open; False where another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def unlock(file: IO[bytes]) -> None:
    """Undo `try_lock`."""
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
