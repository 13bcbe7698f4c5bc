"""The routes behind the jobs panel, on a real server: what they tell, what they change, and whom they refuse."""

import http.client
import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.nodes.fake_jobs import PROMPTS, FakeRun, job_config, make_job, record, write_samples, write_steps
from train.jobs import JOB, LOG, STATUS, Jobs, Status

ROOT = "/kandinsky5/jobs"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def folder(comfy):
    """The server's jobs, none at first."""
    folder = comfy.base / "output" / "kandinsky5" / "jobs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


@pytest.fixture
def ask(comfy):
    """Send a path exactly as written: clients tidy `..` away."""

    def send(path, method="GET", headers=None, body=None, root=ROOT):
        connection = http.client.HTTPConnection("127.0.0.1", comfy.port, timeout=60)
        try:
            connection.request(method, root + path, body=body, headers=headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    return send


@pytest.fixture
def change(ask):
    return lambda job, action, **headers: ask(f"/{job.id}/{action}", "POST", {**JSON, **headers}, "{}")


def test_the_list_tells_every_job_newest_first(folder, ask):
    assert ask("").json == {"jobs": []}
    old = make_job(folder, "first", steps=120, sample_every=100)
    time.sleep(1.1)  # ids tell the second
    new = make_job(folder, "second", state="done", steps=500, result="/nowhere.safetensors")
    answer = ask("")
    assert answer.headers["Content-Type"].startswith("application/json") and answer.headers["Cache-Control"] == "no-store"
    second, first = answer.json["jobs"]
    assert (first["id"], second["id"]) == (old.id, new.id)
    assert first["name"] == "first" and first["state"] == "stopped" and first["step"] == 120 and first["num_steps"] == 500
    assert first["can_resume"] and not first["running"] and first["num_samples"] == len(PROMPTS)
    assert first["trains"] == "LoRA 8" and first["model"] == "nano-video" and first["log_bytes"] > 0
    assert not second["can_resume"] and not second["result_exists"]
    # The frontend asks below /api.
    assert ask("", root="/api" + ROOT).json == answer.json


def test_a_broken_job_does_not_hide_the_others(folder, ask):
    good = make_job(folder, "good")
    bad = make_job(folder, "bad")
    (bad.folder / JOB).write_text('{"modle": "x"}')
    (bad.folder / STATUS).write_text("{half")
    listed = {job["id"]: job for job in ask("").json["jobs"]}
    assert listed[good.id]["error"] == "" and "unknown key 'modle'" in listed[bad.id]["error"]
    assert listed[bad.id]["state"] == "failed" and not listed[bad.id]["can_resume"]
    assert ask(f"/{bad.id}").status == 200


def test_details_hold_settings_and_samples(folder, ask):
    job = make_job(folder, "star", steps=250, sample_every=100)
    told = ask(f"/{job.id}").json
    assert told["config"]["lora"]["rank"] == 8 and told["prompts"] == list(PROMPTS) and told["folder"] == str(job.folder)
    assert [row["step"] for row in told["samples"]] == [100, 200]
    assert told["samples"][0]["files"] == [
        {"file": f"{number:02d}.png", "kind": "image", "prompt": prompt} for number, prompt in enumerate(PROMPTS)
    ]


def test_a_killed_job_is_told_as_lost(folder, ask):
    job = make_job(folder, "star", steps=3, state="training")
    told = ask(f"/{job.id}").json
    assert told["state"] == "lost" and told["can_resume"] and "resume" in told["message"]


def test_progress_comes_after_the_step_asked_for(folder, ask):
    job = make_job(folder, "star", steps=60)
    whole = ask(f"/{job.id}/progress").json
    assert [point["step"] for point in whole["points"]] == list(range(1, 61))
    assert whole["points"][49] == record(50) and whole["last"] == 60 and not whole["downsampled"] and whole["total"] == 60
    assert [point["step"] for point in ask(f"/{job.id}/progress?after=57").json["points"]] == [58, 59, 60]
    write_steps(job, 61, 62)
    assert [point["step"] for point in ask(f"/{job.id}/progress?after=60").json["points"]] == [61, 62]
    assert ask(f"/{job.id}/progress?after=62").json["points"] == []


def test_progress_after_a_resume_forgets_what_was_undone(folder, ask):
    job = make_job(folder, "star", steps=120)
    write_steps(job, 101, 105)
    for after in (0, 90):
        told = ask(f"/{job.id}/progress?after={after}").json
        assert [point["step"] for point in told["points"]] == list(range(after + 1, 106)) and told["last"] == 105


def test_progress_survives_a_line_cut_off_and_a_loss_that_is_no_number(folder, ask):
    job = make_job(folder, "star", steps=2)
    with (job.folder / "progress.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": NaN, "smoothed": Infinity}\n{"step": 4, "lo')
    for after in (0, 2):
        told = ask(f"/{job.id}/progress?after={after}").json
        assert told["points"][-1] == {"step": 3, "loss": None, "smoothed": None} and told["last"] == 3


def test_a_long_progress_is_thinned_and_says_so(folder, ask):
    job = make_job(folder, "long", steps=0)
    lines = [json.dumps(record(step, every=500)) for step in range(1, 30_001)]
    lines[17_123] = json.dumps({**record(17_124), "loss": 99.0})
    (job.folder / "progress.jsonl").write_text("\n".join(lines) + "\n")
    told = ask(f"/{job.id}/progress").json
    steps = [point["step"] for point in told["points"]]
    assert told["downsampled"] and told["total"] == 30_000 and 1000 < len(steps) <= 2000
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == told["last"] == 30_000
    assert 17_124 in steps and {step for step in steps if step % 500 == 0} >= set(range(500, 30_001, 500))
    assert len(ask(f"/{job.id}/progress?after=29990").json["points"]) == 10


def test_log_is_its_end(folder, ask):
    job = make_job(folder, "star")
    (job.folder / LOG).write_text("first\n" + "line\n" * 10_000 + "星星\n")
    told = ask(f"/{job.id}/log?bytes=20").json
    assert told["cut"] and told["text"].endswith("line\n星星\n") and len(told["text"].encode()) <= 20
    assert not ask(f"/{job.id}/log?bytes=1000000").json["cut"]


@pytest.mark.parametrize("path", ["/progress?after=-1", "/progress?after=x", "/progress?after=1e3", "/log?bytes=0",
                                  "/log?bytes=99999999", "/log?bytes=%D9%A3"])  # fmt: skip
def test_odd_numbers_are_refused(folder, ask, path):
    answer = ask(f"/{make_job(folder, 'star').id}{path}")
    assert answer.status == 400 and "must be a whole number from" in answer.error


def test_sample_bytes(folder, ask):
    job = make_job(folder, "star", steps=100, sample_every=100)
    file = job.folder / "samples" / "step-00000100" / "00.png"
    answer = ask(f"/{job.id}/samples/100/00.png")
    assert answer.status == 200 and answer.body == file.read_bytes() and answer.headers["Content-Type"] == "image/png"
    assert "no-cache" in answer.headers["Cache-Control"] and answer.headers["X-Content-Type-Options"] == "nosniff"
    clip = file.with_name("01.mp4")
    clip.write_bytes(bytes(range(256)) * 8)
    part = ask(f"/{job.id}/samples/100/01.mp4", headers={"Range": "bytes=16-31"})
    assert part.status == 206 and part.body == bytes(range(16, 32)) and part.headers["Content-Type"] == "video/mp4"


def odd_files(job, tmp_path):
    """Things beside the samples that nobody may have."""
    made = write_samples(job, 100)
    (tmp_path / "secret.png").write_bytes(b"PRIVATE")
    (made / "link.png").symlink_to(tmp_path / "secret.png")
    (made / "notes.txt").write_text("PRIVATE")
    (made / "folder.png").mkdir()
    (made.parent / "step-00000200").symlink_to(tmp_path)
    (made.parent / "loose.png").write_bytes(b"PRIVATE")


@pytest.mark.parametrize(
    "path",
    [
        "100/link.png", "100/notes.txt", "100/folder.png", "200/secret.png", "100/..%2floose.png", "100/../loose.png",
        "100/..%2f..%2f..%2fjob.json", "100/%2fetc%2fpasswd", "100//etc/passwd", "100/00.png%00", "100/..\\loose.png",
        "..%2f100/00.png", "../100/00.png", "00000100/00.png", "-100/00.png", "100/", "100", "", "100/none.png",
        "100/00.PNG", "100/%2e%2e", "300/00.png",
    ],
)  # fmt: skip
def test_samples_beside_the_list_are_refused(folder, ask, tmp_path, path):
    job = make_job(folder, "star")
    odd_files(job, tmp_path)
    assert ask(f"/{job.id}/samples/100/00.png").status == 200
    answer = ask(f"/{job.id}/samples/{path}")
    assert answer.status == 404 and b"PRIVATE" not in answer.body and "error" in answer.json


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2f..", "..%2f..%2fetc", "%00", "star%00", "%2fetc", "%2Ftmp%2Fx", "C:%5CWindows", "link",
     "STAR", "a" * 81, ".hidden", "no-such-job", "%D1%81", "job.json"],
)  # fmt: skip
@pytest.mark.parametrize("rest", ["", "/progress", "/log", "/samples/100/00.png", "/stop", "/resume", "/delete", "/open"])
def test_ids_outside_the_folder_are_refused(folder, ask, tmp_path, name, rest):
    outside = make_job(tmp_path, "outside", steps=100, sample_every=100)
    (folder / "link").symlink_to(outside.folder)
    (folder / ".hidden").mkdir()
    shutil.copy(outside.folder / JOB, folder / ".hidden" / JOB)
    is_change = rest in ("/stop", "/resume", "/delete", "/open")
    answer = ask(f"/{name}{rest}", "POST" if is_change else "GET", JSON if is_change else None, "{}" if is_change else None)
    assert answer.status == 404 and answer.error
    assert outside.folder.exists() and (folder / "link").is_symlink() and not outside.stop_wanted()
    assert ask("").json["jobs"] == []


def test_stop_asks_a_running_job_alone(folder, ask, change):
    idle = make_job(folder, "idle")
    answer = change(idle, "stop")
    assert answer.status == 409 and "does not run" in answer.error and not idle.stop_wanted()
    job = make_job(folder, "star", num_steps=100_000)
    with FakeRun(job) as run:
        assert ask(f"/{job.id}").json["running"]
        assert change(job, "stop").json == {"id": job.id, "ok": True}
        run.wait(lambda: not job.is_alive())
    told = ask(f"/{job.id}").json
    assert told["state"] == "stopped" and told["can_resume"] and told["step"] > 0


def test_a_running_job_is_neither_deleted_nor_resumed(folder, change):
    job = make_job(folder, "star", num_steps=100_000)
    with FakeRun(job):
        for action in ("delete", "resume"):
            answer = change(job, action)
            assert answer.status == 409 and "running" in answer.error
    assert job.folder.exists()


def test_delete_removes_the_folder_and_follows_no_links(folder, ask, change, tmp_path):
    job = make_job(folder, "star", steps=100, sample_every=100)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "material.txt").write_text("mine")
    (job.folder / "cache").symlink_to(tmp_path / "kept")
    assert change(job, "delete").status == 200
    assert not job.folder.exists() and (tmp_path / "kept" / "material.txt").exists()
    assert change(job, "delete").status == 404 and ask("").json["jobs"] == []


def test_resume_starts_the_trainer_and_tells_its_end(folder, ask, change):
    job = make_job(folder, "star", steps=10)
    job.stop()
    before = (job.folder / LOG).stat().st_size
    assert change(job, "resume").status == 200
    assert not job.stop_wanted() and ask(f"/{job.id}").json["state"] != "stopped"
    second = change(job, "resume")
    end = time.monotonic() + 240
    while ask(f"/{job.id}").json["running"]:
        assert time.monotonic() < end, job.log_tail()
        time.sleep(0.3)
    # The job is a real one without material, so that it ends at once and says what is missing.
    told = ask(f"/{job.id}").json
    assert told["state"] == "failed" and "/no/such/folder" in told["message"], job.log_tail()
    assert (job.folder / LOG).stat().st_size > before
    assert second.status == 409 and "running already" in second.error


def test_a_finished_job_is_not_resumed(folder, change):
    answer = change(make_job(folder, "star", steps=500, state="done"), "resume")
    assert answer.status == 409 and "done" in answer.error


def test_a_job_with_wrong_settings_is_not_resumed(folder, change):
    job = make_job(folder, "star", config=job_config("star"))
    (job.folder / JOB).write_text('{"modle": "x"}')
    answer = change(job, "resume")
    assert answer.status == 409 and "unknown key 'modle'" in answer.error


def test_open_is_for_the_machine_itself(folder, ask, change, comfy):
    job = make_job(folder, "star")
    for headers in ({"Host": "example.org"}, {"X-Forwarded-For": "10.0.0.1"}, {"Forwarded": "for=10.0.0.1"}):
        answer = change(job, "open", **headers)
        assert answer.status == 403 and "on the machine that runs ComfyUI" in answer.error
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        answer = change(job, "open")
        assert answer.status == 501 and str(job.folder) in answer.error


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Host": "192.168.1.2:8188"},
    {"Origin": "http://evil.example", "Host": "192.168.1.2:8188"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_origins_are_refused(folder, ask, change, headers):
    job = make_job(folder, "star", steps=100, sample_every=100)
    for path in ("", f"/{job.id}", f"/{job.id}/progress", f"/{job.id}/log", f"/{job.id}/samples/100/00.png"):
        assert ask(path, headers=headers).status == 403
        assert ask(path, headers=headers, root="/api" + ROOT).status == 403
    for action in ("stop", "resume", "delete", "open"):
        assert change(job, action, **headers).status == 403
    assert job.folder.exists() and not job.stop_wanted() and job.read_status().state == "stopped"


def test_the_own_page_and_programs_are_let_in(folder, ask, comfy):
    assert ask("", headers={"Origin": comfy.url, "Sec-Fetch-Site": "same-origin"}).status == 200
    assert ask("", headers={"Origin": comfy.url}).status == 200
    assert ask("", headers={"Sec-Fetch-Site": "none"}).status == 200
    assert ask("", headers={"Origin": "http://192.168.1.2:8188", "Host": "192.168.1.2:8188"}).status == 200


@pytest.mark.parametrize("action", ["stop", "resume", "delete", "open"])
def test_changes_only_by_post_with_json(folder, ask, action):
    job = make_job(folder, "star")
    path = f"/{job.id}/{action}"
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        assert ask(path, method).status == 405
    assert "POST" in ask(path).error
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(path, "POST", {"Content-Type": kind}, "{}").status == 415
    assert ask(path, "POST").status == 415
    assert ask(path, "POST", JSON, " " * 70_000).status == 413
    assert job.folder.exists() and not job.stop_wanted() and job.read_status().state == "stopped"


@pytest.mark.parametrize("path", ["/", "/{id}/", "/{id}/checkpoints", "/{id}/job.json", "/{id}/samples", "/{id}/unknown"])
def test_nothing_else_is_listed(folder, ask, path):
    job = make_job(folder, "star")
    answer = ask(path.format(id=job.id))
    assert answer.status == 404 and answer.error


def test_a_job_started_elsewhere_is_shown_without_a_restart(comfy, folder, ask):
    job = Jobs(Path(folder)).create(job_config("from a terminal"))
    job.write_status(Status(state="starting", num_steps=500, updated=time.time()))
    (listed,) = ask("").json["jobs"]
    assert listed["name"] == "from a terminal" and listed["state"] == "starting" and listed["running"]
    assert quote(job.id) == job.id
