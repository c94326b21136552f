"""`python -m bench.table`: the newest line of every row as the table in docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def newest() -> list[dict[str, Any]]:
    """The last line of each (row, name, machine), by row."""
    found = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["row"], line["name"], line["machine"]] = line
    return [found[key] for key in sorted(found)]


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| row | name | ratio | quartiles | bar | | date | commit | machine |", "|" + "---|" * 9]
    for line in lines:
        figures = line["figures"]
        sign = "≥" if figures["bar_is"] == "at least" else "≤"
        ratio = figures.get("missing", "not measured") if line["ratio"] is None else f"{line['ratio']:.3f}"
        spread = " to ".join(f"{each:.3f}" for each in figures.get("quartiles", ()))
        verdict = "holds" if line["ok"] else "**falls short**"
        machine = f"{line['machine']}, {line['threads']} threads"
        cells = (line["row"], line["name"], ratio, spread, f"{sign} {line['bar']:g}", verdict, figures["date"])
        rows.append(f"| {' | '.join(map(str, cells))} | `{line['commit']}` | {machine} |")
    return "\n".join(rows)


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(newest())}\n{END}{after}")


if __name__ == "__main__":
    main()
