"""What `kandinsky5 plan` predicts beside what is measured, as a Markdown table.

    python -m benchmarks.planner

Bytes of live tensors are counted, so the table is the same on every machine but for the version of PyTorch.
"""

from __future__ import annotations

from kandinsky5_core.bench.planned import every_case, table


def main() -> None:
    for line in table(every_case()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
