"""Jobs as processes: their folder, their end in every way, and that nothing is lost."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint import list_checkpoints
from train.config import DataConfig, FitConfig, JobConfig, LoraConfig, SampleConfig, SourceConfig, ValidationConfig
from train.jobs import JOB, LOCK, PROGRESS, STATUS, Job, Jobs, Status, launch, wait_for_end

PACK = Path(__file__).parents[2]
STAR = PACK / "workflows" / "datasets" / "star"
SECONDS = 900
"""Of patience with a loaded machine; nothing here asserts how long anything takes."""


def config(**changes) -> JobConfig:
    values = {
        "name": "star",
        "model": "nano-video",
        "data": DataConfig(sources=(SourceConfig(path=str(STAR)),), frame_budget=15),
        "lora": LoraConfig(rank=4, alpha=4.0, dropout=0.1),
        "fit": FitConfig(num_steps=6, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=2),
        "validation": ValidationConfig(every=0),
        "device": "cpu",
        "threads": 1,
        **changes,
    }
    return JobConfig(**values)


@pytest.fixture
def jobs(tmp_path: Path, cache: Path) -> Jobs:
    return Jobs(tmp_path / "jobs")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for all: the material is the same."""
    return tmp_path_factory.mktemp("cache")


def with_cache(job_config: JobConfig, cache: Path) -> JobConfig:
    return dataclasses.replace(job_config, data=dataclasses.replace(job_config.data, cache=str(cache)))


def run(job: Job, *, expect: str = "done") -> Status:
    launch(job)
    return ended(job, expect=expect)


def ended(job: Job, *, expect: str) -> Status:
    wait_for(lambda: not job.status().running, job)
    status = job.status()
    assert status.state == expect, (status, job.log_tail())
    return status


def wait_for(condition, job: Job) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, job.log_tail()
        time.sleep(0.02)


def at_step(job: Job, step: int) -> None:
    """Until the job has told of a step; its steps are slowed by what the test does meanwhile."""
    wait_for(lambda: job.read_status().step >= step or not job.read_status().running, job)


def last_tensors(job: Job) -> dict[str, torch.Tensor]:
    # Copies: safetensors maps the file, which the test may change.
    return {name: tensor.clone() for name, tensor in load_file(list_checkpoints(job.folder)[-1]).items()}


def test_a_job_goes_from_material_to_a_lora_that_loads(jobs: Jobs, cache: Path) -> None:
    validation = ValidationConfig(
        every=3, num_steps=2, samples=(SampleConfig(prompt="a big red star on a black background"),)
    )
    job = jobs.create(with_cache(config(validation=validation), cache))
    status = run(job)
    assert status.step == 6 and Path(status.result).is_file()
    assert [record["step"] for record in job.progress()] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "smoothed", "rate", "grad_norm", "seconds"} <= job.progress()[0].keys()
    assert [record["step"] for record in job.progress() if "validation" in record] == [3, 6]
    assert [(step, [file.name for file in files]) for step, files in job.samples()] == [(3, ["00.mp4"]), (6, ["00.mp4"])]
    assert "24 clips" in job.scan_report()
    assert status.peak_bytes > 0 and status.best_loss is not None
    from kandinsky5_core.weights.lora_tools import lora_info

    told = lora_info(Path(status.result))
    assert told["rank"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache: Path) -> Job:
    """A run that nobody disturbed."""
    job = Jobs(tmp_path_factory.mktemp("whole")).create(with_cache(LONG, cache))
    run(job)
    return job


LONG = config(fit=FitConfig(num_steps=40, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=100))


def assert_same_end(job: Job, whole: Job) -> None:
    """Bit by bit: weights, averages, optimizer; and the losses on the way."""
    ours, theirs = last_tensors(job), last_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [record["loss"] for record in job.progress()] == [record["loss"] for record in whole.progress()]


def test_stopped_anywhere_and_resumed_it_is_bitwise_as_if_never_stopped(jobs: Jobs, cache: Path, whole: Job) -> None:
    cut = jobs.create(with_cache(LONG, cache))
    for step, how in ((4, "STOP"), (14, signal.SIGINT), (24, signal.SIGTERM)):
        pid = launch(cut)
        at_step(cut, step)
        cut.stop() if how == "STOP" else os.kill(pid, how)
        status = ended(cut, expect="stopped")
        assert step <= status.step < 40
        assert list_checkpoints(cut.folder)[-1].stem == f"step-{status.step:08d}"
        assert Path(status.result).is_file()
    run(cut)
    assert_same_end(cut, whole)


def test_a_job_that_told_its_end_goes_on_once_its_process_is_gone(jobs: Jobs, cache: Path) -> None:
    job = jobs.create(with_cache(config(), cache))
    hold = "import sys, time; from train.jobs import Job; from pathlib import Path\n" \
           "with Job(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(float(sys.argv[2]))"  # fmt: skip

    def held(seconds: float, state: str) -> subprocess.Popen:
        job.write_status(Status(state=state, updated=time.time()))
        process = subprocess.Popen(
            [sys.executable, "-c", hold, str(job.folder), str(seconds)], cwd=PACK, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
        return process

    with held(2, "stopped"):
        wait_for_end(job)
        assert not job.is_alive()
    for state, patience in (("training", 60.0), ("stopped", 0.2)):
        with held(60, state) as process:
            with pytest.raises(ValueError, match="is already running"):
                wait_for_end(job, patience)
            process.kill()


def test_killed_with_9_it_is_found_marked_and_goes_on(jobs: Jobs, cache: Path, whole: Job) -> None:
    killed = jobs.create(dataclasses.replace(
        with_cache(LONG, cache), fit=dataclasses.replace(LONG.fit, checkpoint_every=3)))  # fmt: skip
    pid = launch(killed)
    at_step(killed, 7)
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: not killed.is_alive(), killed)
    found = Jobs(jobs.folder).get(killed.id).status()
    assert found.state == "lost" and "resume" in found.message
    assert json.loads((killed.folder / STATUS).read_text())["state"] == "lost"
    run(killed)
    assert_same_end(killed, whole)


def test_a_second_process_and_a_delete_are_refused_while_it_runs(jobs: Jobs, cache: Path) -> None:
    job = jobs.create(with_cache(config(fit=dataclasses.replace(config().fit, num_steps=500)), cache))
    launch(job)
    at_step(job, 1)
    with pytest.raises(ValueError, match="already running"):
        launch(job)
    with pytest.raises(ValueError, match="stop it first"):
        jobs.delete(job.id)
    job.stop()
    ended(job, expect="stopped")
    jobs.delete(job.id)
    assert jobs.all() == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path, cache: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk here: {mounted.stderr.decode().strip()}")
    try:
        long = config(fit=dataclasses.replace(config().fit, num_steps=12, checkpoint_every=2, keep_last=50))
        job = Jobs(small).create(with_cache(long, cache))
        status = run(job, expect="failed")
        assert "free" in status.message and str(small) in status.message
        kept = list_checkpoints(job.folder)
        assert kept and all(load_file(path) for path in kept)
        assert not list(job.folder.rglob("*.partial"))
        roomy = Job(Path(shutil.copytree(job.folder, tmp_path / "roomy" / job.id)))
        assert run(roomy).step == 12
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(jobs: Jobs, cache: Path) -> None:
    job = jobs.create(with_cache(config(), cache))
    run(job)
    before, newest = list_checkpoints(job.folder)[-2:]
    whole = last_tensors(job)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    run(job)
    assert "is damaged" in job.log_tail()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in last_tensors(job).items())
    assert before.exists()


def test_two_processes_with_one_batch_are_one_process_with_two(jobs: Jobs, cache: Path, tmp_path: Path) -> None:
    fit = dataclasses.replace(config().fit, num_steps=3)
    plain = with_cache(config(fit=fit, lora=LoraConfig(rank=4, alpha=4.0)), cache)
    alone = jobs.create(dataclasses.replace(plain, fit=dataclasses.replace(fit, accumulation=2)))
    run(alone)
    both = jobs.create(plain)
    # What `accelerate launch` does for several GPUs; for CPUs it asks for MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train",
               "run", str(both.folder / JOB)]  # fmt: skip
    done = subprocess.run(
        command, cwd=PACK, env={**os.environ, "PYTHONPATH": str(PACK), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert both.status().state == "done"
    ours, theirs = last_tensors(both), last_tensors(alone)
    for name in theirs:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_bad_settings_end_the_job_with_a_word_about_them(jobs: Jobs) -> None:
    missing = jobs.create(config(data=DataConfig(sources=(SourceConfig(path="/nowhere/at/all"),))))
    assert "does not exist" in run(missing, expect="failed").message
    elsewhere = jobs.create(config(device="cuda"))
    if not torch.cuda.is_available():
        assert "use 'auto' or 'cpu'" in run(elsewhere, expect="failed").message
    broken = jobs.create(config())
    values = json.loads((broken.folder / JOB).read_text())
    (broken.folder / JOB).write_text(json.dumps({**values, "modle": "x"}))
    with pytest.raises(ValueError, match="did you mean 'model'"):
        launch(broken)


def test_ids_and_listing(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    made = [jobs.create(config(name=name)) for name in ("My LoRA!", "  ../../x  ", "")]
    assert len({job.id for job in made}) == 3
    assert {job.id for job in jobs.all()} == {job.id for job in made}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(made[0].folder)
    for bad in ("..", "../x", "a/b", "", "A", "x" * 200, "elsewhere", "link", "%2e%2e", None):
        with pytest.raises(ValueError, match=r"not a job's id|there is no job"):
            jobs.get(bad)


def test_a_job_that_never_came_up_is_lost(tmp_path: Path) -> None:
    job = Jobs(tmp_path).create(config())
    job.write_status(Status(state="starting", updated=time.time()))
    assert job.status().state == "starting"
    job.write_status(Status(state="starting", updated=time.time() - 1000))
    assert job.status().state == "lost"
    job.write_status(Status(state="training", step=4, updated=time.time()))
    with job.locked():
        assert job.status().state == "training"
    assert job.status().state == "lost"
    assert (job.folder / LOCK).exists()


def test_progress_survives_a_torn_line_and_a_step_made_twice(tmp_path: Path) -> None:
    job = Jobs(tmp_path).create(config())
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 9.0}', '{"step": 2, "loss": 2.0}', '{"step": 3, "lo']
    (job.folder / PROGRESS).write_text("\n".join(lines))
    assert [(record["step"], record["loss"]) for record in job.progress()] == [(1, 1.0), (2, 2.0)]
    assert [record["step"] for record in job.progress(after=1)] == [2]
