"""How the figures of `benchmarks.vae` are shown: a Markdown table and a plot over the number of frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEAD = (
    "", "clip", "way", "seconds", "CPU time to untiled", "times as fast as official", "as diffusers", "peak MiB",
    "PSNR", "seams",
)  # fmt: skip
STYLES = {"untiled": ("grey", "o"), "official": ("tab:red", "s"), "diffusers": ("tab:orange", "^"),
          "ours": ("tab:blue", "D")}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one way over one clip."""

    direction: str
    size: str
    frames: int
    kind: str
    way: str
    seconds: float
    cpu_seconds: float
    to_untiled: float
    """Process time over that of the untiled pass."""
    as_official: float | None
    """Process time of the official tiles of whole frames over this one's."""
    as_diffusers: float | None
    peak_mib: float
    budget_mib: float | None
    psnr: float | None
    """To the untiled pass in fp32; None for that pass itself."""
    seams: float | None

    def cells(self) -> list[str]:
        """Of the table."""
        return [
            self.direction, f"{self.size}x{self.frames}", self.way, f"{self.seconds:.2f}", f"{self.to_untiled:.2f}",
            _number(self.as_official), _number(self.as_diffusers), f"{self.peak_mib:.0f}", _number(self.psnr, ".1f"),
            _number(self.seams),
        ]  # fmt: skip


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def markdown(lines: Iterable[Iterable[str]]) -> str:
    """Rows of cells, the first of them the head."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([rows[0], "|---" * (rows[0].count("|") - 1) + "|", *rows[1:]])


def plot(rows: list[Row], path: Path) -> None:
    """Time, peak and PSNR over the number of frames, a line for each way and size; encoding above decoding."""
    from matplotlib.figure import Figure

    directions, sizes = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("direction", "size"))
    figure = Figure(figsize=(14, 3.8 * len(directions)), layout="constrained")
    axes = figure.subplots(len(directions), 3, squeeze=False)
    shown = (("to_untiled", "CPU time to untiled"), ("peak_mib", "peak, MiB"), ("psnr", "PSNR to untiled, dB"))
    for line, direction in zip(axes, directions, strict=True):
        for axis, (key, title) in zip(line, shown, strict=True):
            for kind, (color, marker) in STYLES.items():
                for size, dashes in zip(sizes, ("-", "--", ":", "-.") * len(sizes), strict=False):
                    points = _points(rows, direction, size, kind, key)
                    if points:
                        look = {"color": color, "marker": marker, "label": f"{kind}, {size}"}
                        axis.plot(*zip(*points, strict=True), dashes, **look)
            axis.set(xlabel="frames", title=f"{direction}: {title}")
            axis.grid(alpha=0.3)
    for line in axes:
        line[1].set_yscale("log")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _points(rows: list[Row], direction: str, size: str, kind: str, key: str) -> list[tuple[int, float]]:
    """Of a way's first row for each number of frames."""
    found: dict[int, float | None] = {}
    for row in rows:
        if (row.direction, row.size, row.kind) == (direction, size, kind):
            found.setdefault(row.frames, getattr(row, key))
    return sorted((frames, value) for frames, value in found.items() if value is not None)
