"""`benchmarks/gpu.py`: stages run at tiny sizes, one that fails or is cut stops no other, goals are judged."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import subject
from benchmarks.gpu_parts.notes import Notes, TooLittleTimeError
from benchmarks.gpu_parts.subject import TINY, Given
from benchmarks.gpu_parts.summary import GOALS, Goal, cell, goal_rows, markdown, table
from kandinsky5_core.attention.dense import dense_attention
from kandinsky5_core.attention.engines import ChosenEngine
from kandinsky5_core.config import NANO_VIDEO


def run(tmp_path, *options):
    code = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny", *options])
    return code, json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()


def test_every_stage_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("torchao")
    # A busy machine may take its time: no stage is to be cut here.
    code, report, page = run(tmp_path, "--budget", "3000", "--patience", "5")
    stages = report["stages"]
    log = (tmp_path / "gpu.log").read_text()
    assert code == 0 and list(stages) == list(gpu.STAGES), log
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(gpu.STAGES, "done"), log
    assert {name: stage["found"]["errors"] for name, stage in stages.items()} == {name: {} for name in gpu.STAGES}
    facts = {name: stage["found"]["facts"] for name, stage in stages.items()}
    assert report["machine"]["device"] == "cpu" and report["rehearsal"] is True
    # Every goal whose figure does not need a card has one.
    needs_card = {"planned_ratio_step", "planned_ratio_text", "largest_share_of_budget", "attention_error"}
    for goal in GOALS:
        assert (goal.fact in facts[goal.stage]) is (goal.fact not in needs_card), goal
    assert facts["dit"]["error"] < 1e-4 and facts["dit"]["compiled_error"] < 1e-4 and facts["image"]["error"] < 1e-4
    assert facts["swap"]["same_bits"] is True
    assert abs(facts["nabla"]["sparsity"] - 0.3) < 0.02 and facts["nabla"]["path"].startswith("nabla: gathered")
    assert [row["what"] for row in stages["dit"]["found"]["tables"]["step"]] == [
        "ours", "diffusers (native)", "ours, compiled",
    ]  # fmt: skip
    assert [row["weights"] for row in stages["quant"]["found"]["tables"]["weights"]] == ["as-is", "int8", "fp8"]
    assert all(row["PSNR"] is None or row["PSNR"] > 60 for row in stages["vae"]["found"]["tables"]["decode"])
    skipped = stages["engines"]["found"]["skipped"]
    assert skipped["cudnn"] == "needs CUDA, not cpu" and "compiling" in skipped["flex"]
    assert page == markdown(report) and "rehearsal, not judged" in page and "| NOT met |" not in page


def test_stages_that_fail_stop_no_other_and_say_why(tmp_path):
    code = gpu.main(["--out", str(tmp_path), "--device", "nowhere", "--tiny", "--only", "swap", "load"])
    report, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert code == 1 and [stage["status"] for stage in report["stages"].values()] == ["failed", "failed"]
    for name in ("swap", "load"):
        assert report["stages"][name]["why"].startswith("ValueError: device 'nowhere' cannot be used here")
    assert page.count("- FAILED: the stage: ValueError: device 'nowhere'") == 2


def test_what_a_stage_had_found_outlasts_its_failure(tmp_path, monkeypatch, capsys):
    def measure(name, args, notes):
        notes.fact("begun", name)
        raise RuntimeError("no such stream")

    monkeypatch.setattr(gpu, "measure", measure)
    path = tmp_path / "notes.json"
    assert gpu.main(["--out", str(tmp_path), "--child", "swap", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["facts"] == {"begun": "swap"} and found["errors"] == {"the stage": "RuntimeError: no such stream"}
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_is_cut_when_its_time_is_up_and_one_without_time_is_not_begun(tmp_path, monkeypatch):
    stages = {"dit": replace(gpu.STAGES["dit"], most=1, least=0), "text": replace(gpu.STAGES["text"], least=10**6)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    code, report, page = run(tmp_path)
    assert code == 1 and report["stages"]["dit"]["status"] == "cut" and "its 1 s were over" in page
    assert report["stages"]["text"]["status"] == "not begun" and "it takes 1000000" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--only", "dream"], "--only dream is no stage; use dit, nabla"), (["--device", "cpu"], "add --tiny")],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        gpu.main(["--out", str(tmp_path), *options])


# --- notes and the summary


def test_notes_are_on_disk_with_every_figure_and_outlast_an_error(tmp_path, capsys):
    path = tmp_path / "notes.json"
    notes = Notes(path, seconds=100)
    notes.fact("a", 1.5)
    assert json.loads(path.read_text())["facts"] == {"a": 1.5}

    def fails():
        notes.row("steps", {"what": "x"})
        raise RuntimeError("CUDA error: misaligned address\nmore lines")

    assert notes.attempt("half", fails) is None and notes.attempt("whole", lambda: 7) == 7
    found = json.loads(path.read_text())
    assert found["errors"] == {"half": "RuntimeError: CUDA error: misaligned address"}
    assert found["tables"] == {"steps": [{"what": "x"}]} and "Traceback" in capsys.readouterr().err


def test_a_part_without_time_is_skipped_and_not_failed():
    notes = Notes(None, seconds=5)
    assert notes.attempt("long", lambda: pytest.fail("begun"), needs=60) is None
    assert notes.found["skipped"]["long"].startswith("too little time: it takes about 60 s") and not notes.found["errors"]
    with pytest.raises(TooLittleTimeError):
        notes.need(6)


def test_a_missing_package_is_told():
    notes = Notes(None)
    assert notes.has("torch") and not notes.has("no_such_package")
    assert notes.found["skipped"] == {"no_such_package": "not installed"}


def test_an_engine_that_fails_at_the_size_is_an_error_and_pytorch_is_measured(monkeypatch):
    def refuse(q, k, v, key_mask=None):
        raise RuntimeError("no plan for this size")

    engines = SimpleNamespace(choose=lambda name, **sizes: ChosenEngine(
        name=name, attend=refuse if name == "auto" else dense_attention, told=name))  # fmt: skip
    monkeypatch.setattr(subject, "probe_engines", lambda device: engines)
    given, notes = Given(device=torch.device("cpu"), dtype=torch.float32, sizes=TINY, tiny=True), Notes(None)
    assert subject.engine_of(given, notes, NANO_VIDEO, 32).name == "sdpa"
    assert notes.found["errors"] == {"engine auto": "RuntimeError: no plan for this size"}


def report_with(**facts):
    stages = {"dit": {"title": "t", "status": "done", "seconds": 3.0, "found": {"facts": facts, "errors": {"x": "broke"}}}}
    return {"machine": {"device": "cuda"}, "options": "--out x", "note": "", "rehearsal": False, "stages": stages}


def test_goals_are_judged_by_what_was_found():
    judged = {row["goal"]: row[""] for row in goal_rows(report_with(times_as_fast=1.2, error=0.5))}
    named = {goal.fact: goal.what for goal in GOALS if goal.stage == "dit"}
    assert judged[named["times_as_fast"]] == "met" and judged[named["error"]] == "NOT met"
    assert judged[named["times_as_fast_compiled"]] == "not measured"
    between = Goal(what="", stage="", fact="", least=0.9, most=1.1)
    assert [between.is_met(value) for value in (0.89, 0.9, 1.1, 1.11)] == [False, True, True, False]
    assert between.told() == "at least 0.9, at most 1.1"
    page = markdown(report_with(times_as_fast=1.2))
    assert "| dit | done | 3 | failed in it: x |" in page and "- FAILED: x: broke" in page


def test_tables_hold_every_column_and_break_no_line():
    text = table([{"a": 1.23456, "b": None}, {"a": True, "c": "x|y\nz"}])
    assert text.splitlines() == ["| a | b | c |", "|---|---|---|", "| 1.235 |  |  |", "| True |  | x/y z |"]
    assert cell(47616) == "47616" and table([]) == "(nothing)"
