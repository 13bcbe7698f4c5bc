"""What the browser is told of a job: plain values for JSON, read from the job's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...train.config import JobConfig, to_dict
from ...train.jobs import JOB, LOG, PROGRESS, Job, Jobs, Status

MAX_POINTS = 2000
"""Of one answer about progress."""
MAX_LOG_BYTES = 1_000_000
BLOCK_BYTES = 65_536
KINDS = {".png": "image", ".mp4": "video"}
Record = dict[str, float]


def all_jobs(jobs: Jobs) -> list[dict[str, Any]]:
    """Every job in short, newest first; links are none of ours."""
    found = []
    for job in jobs.all():
        if job.folder.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found.append(summary(job))
    return found


def summary(job: Job) -> dict[str, Any]:
    """Where a job stands, and by what to see that there is more to ask for."""
    config, error = _config(job)
    try:
        status = job.status()
    except PermissionError as refused:
        # One folder of another user must not hide all others.
        status = Status(state="failed", message=f"the job's folder cannot be used: {refused}")
    return {
        "id": job.id,
        "name": config.name if config else job.id,
        "model": Path(config.model).name if config else "",
        "trains": _trains(config) if config else "",
        "created": (job.folder / JOB).stat().st_mtime,
        **dataclasses.asdict(status),
        "running": status.running,
        "stopping": status.running and job.stop_wanted(),
        "can_resume": config is not None and not status.running and status.state != "done",
        "result_exists": bool(status.result) and Path(status.result).is_file(),
        "num_samples": sum(len(files) for _, files in samples_of(job)),
        "log_bytes": _size(job.folder / LOG),
        "error": error,
    }


def details(job: Job) -> dict[str, Any]:
    """The summary, the settings, the samples, and what the material came to."""
    config, _ = _config(job)
    prompts = [sample.prompt for sample in config.validation.samples] if config else []
    return {
        **summary(job),
        "folder": str(job.folder),
        "config": to_dict(config) if config else None,
        "prompts": prompts,
        "samples": [
            {"step": step, "files": [_sample(file, number, prompts) for number, file in enumerate(files)]}
            for step, files in samples_of(job)
        ],
        "scan": job.scan_report(),
    }


def samples_of(job: Job) -> list[tuple[int, list[Path]]]:
    """(step, files) in order of steps; a folder may be renamed while it is looked at, which then is tried again."""
    for _ in range(3):
        try:
            return sorted(job.samples(), key=lambda entry: entry[0])
        except FileNotFoundError:
            continue
    return []


def sample_file(job: Job, step: str, name: str) -> Path | None:
    """The sample of that step and name; None for whatever is not in the job's own list, or is a link."""
    for made, files in samples_of(job):
        for file in files:
            if str(made) == step and file.name == name:
                inside = file.resolve() == job.folder.resolve() / file.relative_to(job.folder)
                return file if inside and file.is_file() else None
    return None


def progress(job: Job, after: int) -> dict[str, Any]:
    """Records of the steps after step `after`, thinned out where there are many.

    `last` is the newest step of all: where it is below what a reader knows already, the job went back to a checkpoint
    and the reader begins again.
    """
    records = job.progress() if after == 0 else _records_after(job.folder / PROGRESS, after)
    last = _last_step(job.folder / PROGRESS)
    kept = [record for record in records if record["step"] <= last]  # later ones are of before a resume
    points = thinned(kept)
    return {
        "id": job.id, "after": after, "last": last, "total": len(kept), "downsampled": len(points) < len(kept),
        "points": points,
    }  # fmt: skip


def thinned(records: list[Record], limit: int = MAX_POINTS) -> list[Record]:
    """At most about `limit` of the records: of each run of equal length the lowest and the highest loss, so that no
    peak is hidden, and the first and last and every validation (themselves thinned where even they are too many)."""
    if len(records) <= limit:
        return records
    checked = [index for index, record in enumerate(records) if "validation" in record]
    kept = {0, len(records) - 1, *checked[:: max(1, math.ceil(4 * len(checked) / limit))]}
    length = math.ceil(len(records) / max(1, (limit - len(kept)) // 2))
    for start in range(0, len(records), length):
        run = range(start, min(start + length, len(records)))
        kept |= {min(run, key=lambda index: _loss(records[index])), max(run, key=lambda index: _loss(records[index]))}
    return [records[index] for index in sorted(kept)]


def log(job: Job, num_bytes: int) -> dict[str, Any]:
    """The end of the log."""
    size = _size(job.folder / LOG)
    return {"id": job.id, "bytes": size, "cut": size > num_bytes, "text": job.log_tail(num_bytes)}


def finite(value: Any) -> Any:
    """The value without what JSON has no word for: a loss that is no number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def _config(job: Job) -> tuple[JobConfig | None, str]:
    try:
        return job.config(), ""
    except ValueError as error:
        return None, str(error)


def _trains(config: JobConfig) -> str:
    if config.only_cache:
        return "cache"
    return "full" if config.lora is None else f"LoRA {config.lora.rank}"


def _sample(file: Path, number: int, prompts: list[str]) -> dict[str, Any]:
    """Files are named by their prompt's number; where not, their order tells."""
    index = int(file.stem) if file.stem.isdecimal() else number
    prompt = prompts[index] if index < len(prompts) else ""
    return {"file": file.name, "kind": KINDS[file.suffix], "prompt": prompt}


def _records_after(path: Path, after: int) -> list[Record]:
    """Records from the end of the file back to the first that is not after `after`: reads no more than it must."""
    found: list[Record] = []
    for line in _lines_backwards(path):
        record = _record(line)
        if record is not None and record["step"] <= after:
            break
        if record is not None and (not found or record["step"] < found[-1]["step"]):
            found.append(record)
    return found[::-1]


def _last_step(path: Path) -> int:
    """Step of the last whole line."""
    for line in _lines_backwards(path):
        record = _record(line)
        if record is not None:
            return int(record["step"])
    return 0


def _record(line: bytes) -> Record | None:
    """One line; None where it was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Lines of a file from the last to the first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position, rest = file.seek(0, 2), b""
        while position > 0:
            size = min(BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
            rest = first
        yield rest


def _loss(record: Record) -> float:
    loss = record.get("loss")
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
