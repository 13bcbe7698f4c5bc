"""What `benchmarks/gpu.py` found, as Markdown: the goals and whether each is met, then every stage's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that is to reach something."""

    what: str
    stage: str
    fact: str
    least: float | None = None
    most: float | None = None

    def told(self) -> str:
        """What it is to reach."""
        parts = [f"at least {self.least:g}" if self.least is not None else "",
                 f"at most {self.most:g}" if self.most is not None else ""]  # fmt: skip
        return ", ".join(filter(None, parts))

    def is_met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


GOALS = (
    Goal(what="Video Lite, 5 s: a step, times as fast as diffusers with its best exact engine", stage="dit",
         fact="times_as_fast", least=1.15),
    Goal(what="the same, ours compiled", stage="dit", fact="times_as_fast_compiled_to_eager", least=1.15),
    Goal(what="the same, both compiled", stage="dit", fact="times_as_fast_compiled", least=1.15),
    Goal(what="Video Lite, 5 s: relative difference of the outputs in bf16", stage="dit", fact="error", most=0.02),
    Goal(what="Video Lite, 10 s: a step with NABLA, times as fast as dense", stage="nabla", fact="times_as_fast",
         least=2.7),
    Goal(what="the same, blocks compiled", stage="nabla", fact="times_as_fast_compiled", least=2.7),
    Goal(what="share of token blocks that NABLA drops there", stage="nabla", fact="sparsity", least=0.89, most=0.91),
    Goal(what="error of NABLA's attention to dense attention over the kept blocks", stage="nabla",
         fact="attention_error", most=0.02),
    Goal(what="the VAE's peak as a share of its budget", stage="vae", fact="largest_share_of_budget", most=1.0),
    Goal(what="block swap: the same bits as without", stage="swap", fact="same_bits", least=1),
    Goal(what="planner: predicted over measured, a step of 5 s", stage="dit", fact="planned_ratio_step", least=0.9,
         most=1.1),
    Goal(what="planner: the same, 10 s with NABLA", stage="nabla", fact="planned_ratio_step", least=0.9, most=1.1),
    Goal(what="planner: the same, Pro", stage="pro", fact="planned_ratio_step", least=0.9, most=1.1),
    Goal(what="planner: the same, a picture", stage="image", fact="planned_ratio_step", least=0.9, most=1.1),
    Goal(what="planner: the same, the text encoder", stage="text", fact="planned_ratio_text", least=0.9, most=1.1),
)  # fmt: skip


def markdown(report: Report) -> str:
    """The whole page."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    parts = [
        "# What was measured on this device", f"`python -m benchmarks.gpu {report['options']}`: {machine}",
        "All weights are random, at full width. " + report["note"],
        "## Goals", table(goal_rows(report)), "## Stages", table(stage_rows(report)),
    ]  # fmt: skip
    for name, stage in report["stages"].items():
        parts += [f"## {name}: {stage['title']}", *stage_parts(stage.get("found") or {})]
    return "\n\n".join(parts) + "\n"


def goal_rows(report: Report) -> Iterator[Mapping[str, object]]:
    """A line for each goal."""
    for goal in GOALS:
        value = report["stages"].get(goal.stage, {}).get("found", {}).get("facts", {}).get(goal.fact)
        verdict = "not measured" if value is None else "met" if goal.is_met(value) else "NOT met"
        if report["rehearsal"] and value is not None:
            verdict = "rehearsal, not judged"
        yield {"goal": goal.what, "wanted": goal.told(), "found": value, "": verdict}


def stage_rows(report: Report) -> Iterator[Mapping[str, object]]:
    """A line for each stage."""
    for name, stage in report["stages"].items():
        failed = list((stage.get("found") or {}).get("errors", {}))
        why = "; ".join(filter(None, [stage.get("why", ""), f"failed in it: {', '.join(failed)}" if failed else ""]))
        yield {"stage": name, "ended": stage["status"], "seconds": stage.get("seconds"), "why": why}


def stage_parts(found: Report) -> Iterator[str]:
    """Tables, facts, and what was skipped or failed."""
    for title, rows in found.get("tables", {}).items():
        yield f"{title}:\n\n{table(rows)}"
    for before, key in (("", "facts"), ("Skipped: ", "skipped"), ("FAILED: ", "errors")):
        if values := found.get(key):
            yield "\n".join(f"- {before}{name}: {cell(value)}" for name, value in values.items())


def table(rows: Iterator[Mapping[str, object]] | Sequence[Mapping[str, object]]) -> str:
    """Rows of plain values; the columns are all keys, in the order in which they come."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([cell(row.get(key)) for key in columns] for row in rows)]
    shown = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([shown[0], "|---" * len(columns) + "|", *shown[1:]]) if rows else "(nothing)"


def cell(value: object) -> str:
    """A value on one line; numbers to four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")
