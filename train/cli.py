"""`kandinsky5-train run | scan | cache | domains | list | stop`: jobs from a terminal; heavy imports wait."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .config import JobConfig, from_dict
from .domains_command import add_domains
from .jobs import JOB, STOP, Job, Jobs, visible_cards

JOBS = Path("outputs/jobs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code (0 done, 3 stopped, 1 failed, 2 wrong use)."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        return args.command(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    description = "Train Kandinsky 5: LoRAs and full fine-tunes."
    parser = argparse.ArgumentParser(prog="kandinsky5-train", description=description)
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="run a job, or go on with it")
    run.add_argument("job", type=Path, help="a job's job.json or folder, or any JSON of a job, which gets a new folder")
    run.add_argument("--jobs", type=Path, default=JOBS, help=f"folder for new jobs (default {JOBS})")
    # By `jobs.launch`, which has removed an old STOP: one that is there by now is meant.
    run.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    run.set_defaults(command=_run, only_cache=False)
    cache = commands.add_parser("cache", help="encode a job's material, without training")
    cache.add_argument("job", type=Path, help="as for run")
    cache.add_argument("--jobs", type=Path, default=JOBS, help=argparse.SUPPRESS)
    cache.set_defaults(command=_run, only_cache=True, launched=False)
    for name, text, function in (
        ("scan", "what a job's material comes to, before anything is loaded", _scan),
        ("stop", "ask a running job to save and end", _stop),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", type=Path, help="as for run")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(command=function)
    add_domains(commands)
    listing = commands.add_parser("list", help="jobs and where they stand")
    listing.add_argument("jobs", type=Path, nargs="?", default=JOBS)
    listing.set_defaults(command=_list)
    return parser


def read_job(path: Path) -> JobConfig:
    """The settings in a JSON file or a job's folder.

    Raises:
        ValueError: no such file, no JSON, or a wrong key or value.
    """
    path = path / JOB if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    try:
        return from_dict(JobConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _run(args: argparse.Namespace) -> int:
    config = read_job(args.job)
    if not args.launched:
        os.environ.update(visible_cards(config.device, os.environ))
    if args.only_cache and not config.data.cache:
        raise ValueError("data.cache is empty; name the folder for the cache, and use the same in the job that trains")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (args.job.is_dir() or args.job.name == JOB):
        raise ValueError(f"several processes need a job's folder: put {args.job.name} into one as {JOB}")
    if args.only_cache:
        job = Jobs(args.jobs).create(replace(config, only_cache=True))
    elif args.job.is_dir() or args.job.name == JOB:
        job = Job((args.job if args.job.is_dir() else args.job.parent).resolve())
    else:
        job = Jobs(args.jobs).create(config)
        logging.info("job folder %s", job.folder)
    from .run import run_job

    if not args.launched:
        (job.folder / STOP).unlink(missing_ok=True)
    return run_job(job)


def _scan(args: argparse.Namespace) -> int:
    from .data.scan import scan
    from .run import job_files

    config = read_job(args.job)
    report = scan(config.data, job_files(config).variant)
    sys.stdout.write((json.dumps(report.as_dict(), indent=1) if args.json else report.text()) + "\n")
    report.check()
    return 0


def _stop(args: argparse.Namespace) -> int:
    job = Job(args.job if args.job.is_dir() else args.job.parent)
    if not job.is_alive():
        raise ValueError(f"job {job.id} is not running")
    job.stop()
    return 0


def _list(args: argparse.Namespace) -> int:
    for job in Jobs(args.jobs).all():
        status = job.status()
        sys.stdout.write(f"{job.id:44} {status.state:9} {status.step:>7}/{status.num_steps:<7} {status.message}\n")
    return 0
