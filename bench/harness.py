"""What every benchmark shares: two sides timed in turn, the ratio with its spread, and its line in bench/results/.

Speed is told as a ratio of two things measured in one run, A B A B, so that a machine that is slow for a minute is slow
for both. Each round gives one ratio; the median of these is what counts, and their quartiles are the spread.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from proofs.report import commit, machine

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl")

Side = Callable[[], object]


class PeerMissing(Exception):
    """What a row compares with is not installed: the row is told as not ok, and says what is missing."""


def need(*packages: str) -> None:
    """Raises PeerMissing, naming those that are not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise PeerMissing(f"{', '.join(missing)}: not installed (pip install -e '.[bench]')")


@dataclass(frozen=True)
class Bar:
    """What a ratio has to reach."""

    value: float
    is_: Literal["at least", "at most"]

    def holds(self, ratio: float) -> bool:
        return ratio >= self.value if self.is_ == "at least" else ratio <= self.value


def at_least(value: float) -> Bar:
    return Bar(value, "at least")


def at_most(value: float) -> Bar:
    return Bar(value, "at most")


@dataclass(frozen=True)
class Measured:
    """A line of a table: figures are JSON. ratio None: it could not be measured, and `figures["missing"]` says why.
    ok: whether the bar holds and everything that the row asserts besides."""

    row: int
    name: str
    ratio: float | None
    bar: Bar
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.ratio is not None and self.bar.holds(self.ratio)


@dataclass(frozen=True)
class Ratio:
    """Of paired measurements, one ratio a round."""

    median: float
    quartiles: tuple[float, float]
    rounds: int

    @staticmethod
    def of(above: Sequence[float], below: Sequence[float]) -> Ratio:
        each = [a / b for a, b in zip(above, below, strict=True)]
        low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
        return Ratio(statistics.median(each), (low, high), len(each))

    def figures(self) -> dict[str, Any]:
        return {"quartiles": [round(each, 4) for each in self.quartiles], "rounds": self.rounds}


def timed(work: Side, device: torch.device) -> float:
    """Seconds until the work is done, on the device too."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(
    sides: Mapping[str, Side], device: torch.device, *, rounds: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side in each round, in turn; the rounds of warm-up are not told."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, work in sides.items():
            took = timed(work, device)
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(each), 5) for name, each in seconds.items()}


# --- a benchmark as a command -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs. quick: to see that it does; what it says then is no measurement."""

    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Benchmark = Callable[[Setting], Iterator[Measured]]


def main(row: int, name: str, question: str | None, measure: Benchmark) -> None:
    """`python -m bench.<name> [--device cuda] [--quick]`: measure, print a small table, append a line for each bar.

    --quick: fewer rounds and smaller sides, to see that it runs; nothing is appended.
    """
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="see that it runs; nothing is recorded")
    options = parser.parse_args()
    setting = Setting(torch.device(options.device), options.quick)
    try:
        for measured in measure(setting):
            _tell(measured)
            if not setting.quick:
                _append(measured, setting)
    except PeerMissing as missing:
        absent = Measured(row, name, None, at_least(0), {"missing": str(missing)})
        _tell(absent)
        if not setting.quick:
            _append(absent, setting)


def _tell(measured: Measured) -> None:
    table = Table(title=f"row {measured.row}: {measured.name}", title_justify="left", show_header=False)
    for key, value in measured.figures.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    ratio = "not measured" if measured.ratio is None else f"{measured.ratio:.3f}"
    verdict = "ok" if measured.ok else "FELL SHORT"
    table.add_row("ratio", f"{ratio}, {measured.bar.is_} {measured.bar.value:g}: {verdict}")
    Console(width=120, highlight=False).print(table)


def _append(measured: Measured, setting: Setting) -> None:
    where = torch.cuda.get_device_name(setting.device) if setting.on_gpu else machine()
    line = {
        "row": measured.row, "name": measured.name,
        "ratio": None if measured.ratio is None else round(measured.ratio, 4),
        "bar": measured.bar.value, "ok": measured.ok, "commit": commit(but=["bench/results"]), "machine": where,
        "threads": torch.get_num_threads(), "versions": _versions(),
        "figures": {"date": datetime.date.today().isoformat(), "bar_is": measured.bar.is_, **measured.figures},
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{measured.name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
