"""What was measured: as rows of plain values, a Markdown table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .stages import Case
from .timing import Samples, ratio

Row = dict[str, object]
MATMUL = "matmul"
"""Name of the matrix product that is measured in turns with every case that has known work."""


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
    """Bars of time for each case, with what ran beside it; a panel for each stage."""
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(4.5 * len(stages), 4), layout="constrained")
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        own = [row for row in rows if row["stage"] == stage]
        names = list(dict.fromkeys(["ours", *(name for row in own for name in row["beside"])]))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            heights = [row["seconds"] if name == "ours" else row["beside"].get(name, {}).get("seconds") for row in own]
            places = [place + number * width for place, height in enumerate(heights) if height is not None]
            axis.bar(places, [height for height in heights if height is not None], width, label=name)
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(own))], [row["what"] for row in own])
        axis.tick_params("x", labelrotation=30)
        axis.set(title=stage, ylabel="seconds", yscale="log" if len(own) > 1 else "linear")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
