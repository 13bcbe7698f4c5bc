"""What was measured: as rows of plain values, a Markdown table, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .stages import Case
from .timing import Samples, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, object]
MATMUL = "matmul"
"""Name of the matrix product that is measured in turns with every case that has known work."""
BAR_INCHES, PANEL_INCHES, LEGEND_INCHES = 0.26, 0.7, 0.6
"""Heights in a plot: of a bar, of a panel's title and axis, and of the legend."""


def row_of(
    case: Case, samples: dict[str, Samples], peaks: dict[str, dict[str, object]], matmul_flops: int,
    errors: dict[str, float],
) -> Row:  # fmt: skip
    """The figures of one case.

    Args:
        samples: By name: 'ours', `MATMUL`, and what ran beside.
        errors: Relative difference of the output of ours to the other's, by name.
    """
    ours = samples["ours"]
    row: Row = {"stage": case.stage, "what": case.what, "note": case.note, **ours.figures(), **peaks["ours"]}
    if case.tokens:
        row |= {"tokens": case.tokens, "tokens_per_second": case.tokens / ours.median}
    if case.flops:
        rate = matmul_flops / samples[MATMUL].median
        row |= {
            "flops": case.flops, "flops_per_second": case.flops / ours.median, "matmul_flops_per_second": rate,
            "share_of_matmul": case.flops / ours.median / rate,
        }  # fmt: skip
    row["facts"] = dict(case.facts)
    row["beside"] = {
        name: {**samples[name].figures(), **ratio(samples[name], ours), **peaks.get(name, {}),
               **({"error": errors[name]} if name in errors else {})}
        for name in case.beside
    }  # fmt: skip
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, a line more for each thing that ran beside one."""
    head = ("stage", "what", "seconds", "tokens/s", "of matmul", "peak", "times as fast as", "by CPU time", "differs")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        share, rate, peak = row.get("share_of_matmul"), row.get("tokens_per_second"), row.get("peak_bytes")
        first = [
            f"{row['stage']}", f"{row['what']}", f"{row['seconds']:.3g}", "" if rate is None else f"{rate:.4g}",
            "" if share is None else f"{share:.0%}", "" if peak is None else f"{peak / 2**30:.2f} GiB",
        ]  # fmt: skip
        others = list(row["beside"].items()) or [(None, {})]
        for number, (name, other) in enumerate(others):
            cells = first if number == 0 else [""] * len(first)
            against = "" if name is None else f"{name}: {other['ratio']:.2f}"
            by_cpu = "" if name is None else f"{other['ratio_cpu']:.2f}"
            error = f"{other['error']:.1e}" if "error" in other else ""
            lines.append("| " + " | ".join([*cells, against, by_cpu, error]) + " |")
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be made, before anything is measured.

    Raises:
        ValueError: matplotlib is not installed, or the file is no picture.
    """
    import importlib.util

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path} is no .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib; install it (pip install matplotlib) or leave it out")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of time and of peak memory for each case, with what ran beside it; a row of two panels for each stage."""
    from matplotlib.figure import Figure

    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in dict.fromkeys(_all(rows, "stage"))}
    names = list(dict.fromkeys(["ours", *(name for row in rows for name in row["beside"])]))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    bars = [sum(1 + len(row["beside"]) for row in own) for own in stages.values()]
    heights = [BAR_INCHES * (count + 1) + PANEL_INCHES for count in bars]
    figure = Figure(figsize=(11, sum(heights) + LEGEND_INCHES), layout="constrained")
    panels = figure.subplots(len(stages), 2, squeeze=False, height_ratios=heights)
    for (left, right), (stage, own) in zip(panels, stages.items(), strict=True):
        _bars(left, own, "seconds", 1, "s", colours)
        _bars(right, own, "peak_bytes", 2**30, "GiB", colours)
        left.set(title=f"{stage}: time", xlabel="seconds")
        right.set(title=f"{stage}: peak memory", xlabel="GiB")
    shown = [figure.gca().barh(0, 0, color=colours[name]) for name in names]
    figure.legend(shown, names, loc="outside upper center", ncols=min(4, len(names)), fontsize=8)
    figure.savefig(path, dpi=110)


def _all(rows: Sequence[Row], key: str) -> list[object]:
    return [row[key] for row in rows]


def _bars(axis: Axes, rows: Sequence[Row], key: str, unit: float, suffix: str, colours: Mapping[str, str]) -> None:
    """One figure of each case, and of what ran beside it where that has it, from the top down."""
    place, middles = 0.0, []
    for row in rows:
        first = place
        for name, values in {"ours": row, **row["beside"]}.items():
            value = values.get(key)
            if value is not None:
                drawn = axis.barh(place, value / unit, 0.85, color=colours[name])
                axis.bar_label(drawn, [f"{value / unit:.3g} {suffix}"], padding=3, fontsize=8)
            place += 1
        middles.append((first + place - 1) / 2)
        place += 0.5
    axis.set_yticks(middles, [_wrapped(str(row["what"])) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_xlim(left=0)


def _wrapped(what: str) -> str:
    """A case's name on two lines where it has two parts."""
    return what.replace(", ", "\n", 1)
