"""The frame of the benchmarks: what is told, and that every row has its file."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import GPU_ONLY, LONG, NAMES
from bench.harness import Measured, Ratio, at_least, at_most, interleaved
from bench.table import table

GPU_SCRIPT = Path("bench/gpu.sh")


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    """So that a slow minute, which is slow for both sides, does not count."""
    ratio = Ratio.of([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.quartiles, ratio.rounds) == (2.0, (2.0, 2.5), 3)
    assert Ratio.of([3.0], [2.0]).quartiles == (1.5, 1.5)


@pytest.mark.parametrize(
    ("bar", "ratio", "ok"),
    [(at_least(2), 2.0, True), (at_least(2), 1.99, False), (at_most(2), 2.0, True), (at_most(2), 2.01, False)],
)
def test_a_bar_is_reached_or_not(bar: Any, ratio: float, ok: bool) -> None:
    assert Measured(1, "x", ratio, bar).ok is ok


def test_what_could_not_be_measured_is_not_ok() -> None:
    assert not Measured(1, "x", None, at_least(0), {"missing": "trl is not installed"}).ok


def test_sides_take_turns_and_warm_ups_are_not_told() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = interleaved(sides, torch.device("cpu"), rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3 and [len(each) for each in seconds.values()] == [2, 2]


def test_the_table_says_what_holds_what_falls_short_and_what_is_missing() -> None:
    def line(row: int, ratio: float | None, ok: bool, **figures: Any) -> dict[str, Any]:
        told = {"date": "2026-01-02", "bar_is": "at least", **figures}
        head = {"row": row, "name": f"n{row}", "ratio": ratio, "bar": 1.5, "ok": ok, "commit": "abc"}
        return {**head, "machine": "m", "threads": 2, "versions": {}, "figures": told}

    found = table(
        [line(1, 2.0, True, quartiles=[1.5, 2.5]), line(2, 1.0, False), line(3, None, False, missing="no trl")]
    )
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()[2:]]
    assert [row[2:6] for row in rows] == [
        ["2.000", "1.500 to 2.500", "≥ 1.5", "holds"], ["1.000", "", "≥ 1.5", "**falls short**"],
        ["no trl", "", "≥ 1.5", "**falls short**"],
    ]  # fmt: skip


def test_every_row_has_its_file_and_the_gpu_script_knows_it() -> None:
    assert all(importlib.util.find_spec(f"bench.{name}") for name in NAMES + LONG + GPU_ONLY)
    named = set(re.findall(r"\[(\d+)\]=(\w+)", GPU_SCRIPT.read_text()))
    assert {name for _, name in named} == set(NAMES + GPU_ONLY)
    for row, name in named:
        assert re.search(rf"(main\(|^ROW(, NAME)? = ){row}\b", Path(f"bench/{name}.py").read_text(), re.M), name


def test_results_are_lines_of_the_documented_form() -> None:
    keys = ["row", "name", "ratio", "bar", "ok", "commit", "machine", "threads", "versions", "figures"]
    for path in Path("bench/results").glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            assert list(line) == keys and line["name"] == path.stem


def test_a_benchmark_that_does_not_exist_is_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no benchmark nothing" in done.stderr
