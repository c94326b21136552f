"""What a person sees while a run trains: a bar on a terminal, one line a step anywhere else, and in JSON."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from graftwork.logs import is_json, say
from graftwork.programs.orch_toml import status_of
from graftwork.store.files import read_lines
from graftwork.store.layout import RunTree
from graftwork.store.status import Status

RATE_STEPS = 10
"""Time left is judged from this many steps back."""


@dataclass
class RunWatch:
    """Reads a run's status.json and metrics.jsonl; only what belongs to this start, known by its orch.toml digest."""

    tree: RunTree
    orch_digest: str
    shown_step: int | None = None
    stamp: tuple[int, int] = (0, 0)
    """Time (ns) and size (bytes) of the metrics file that was read last."""

    def status(self) -> Status | None:
        """The run's status, once the trainer has acted on this start's orch.toml."""
        status = status_of(self.tree)
        return status if status is not None and status.orch_digest == self.orch_digest else None

    def new_rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that were not shown yet. Lines up to the step that a resume starts from never are."""
        if self.shown_step is None:
            status = self.status()
            if status is None or status.start_step is None:
                return []
            self.shown_step = status.start_step
        try:
            facts = self.tree.metrics_jsonl.stat()
        except FileNotFoundError:
            return []
        if (facts.st_mtime_ns, facts.st_size) == self.stamp:
            return []
        self.stamp = (facts.st_mtime_ns, facts.st_size)
        after = self.shown_step
        rows = [row for row in read_lines(self.tree.metrics_jsonl) if int(row.get("step", -1)) > after]
        self.shown_step = max([after, *(int(row["step"]) for row in rows)])
        return rows


def clock(seconds: float) -> str:
    """`1:05`, `2:03:59`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return format(value, form) if isinstance(value, int | float) else "-"


@dataclass
class ProgressView:
    """Shows steps as they come. Use as a context manager; nothing is drawn by a thread."""

    max_steps: int
    console: Console = field(default_factory=lambda: Console(stderr=True))
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_STEPS + 1))
    """(seconds of the monotonic clock, step), newest last."""
    said: str = ""

    def __post_init__(self) -> None:
        draws = self.console.is_terminal and not is_json()
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=self.console, auto_refresh=False) if draws else None
        self.task = self.bar.add_task("", total=self.max_steps) if self.bar else None

    def __enter__(self) -> ProgressView:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, message: str) -> None:
        """One line about what is going on; the same line twice in a row is shown once."""
        if message != self.said:
            self.said = message
            if self.bar:
                self.console.print(message, highlight=False, markup=False, soft_wrap=True)
            else:
                say(message)

    def begin(self, step: int) -> None:
        """The run starts (or goes on) from `step`: the clock of the first step runs from here."""
        self.marks.append((time.monotonic(), step))
        self._draw(step, "")

    def show(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        step = int(row["step"])
        self.marks.append((time.monotonic(), step))
        left = self.seconds_left(step)
        measure = "reward" if "reward" in row else "loss"
        idle = measure == "reward" and row.get("grad_norm") == 0
        equal = f" ({groups} groups of equal rewards)" if (groups := row.get("equal_groups")) else ""
        text = (
            f"{measure} {number(row, measure, '.3f')}  {number(row, 'tokens_per_second', ',.0f')} tokens/s"
            f"{f'  {clock(left)} left' if left is not None else ''}{'  skipped' if row.get('skipped') else ''}"
            f"{f'  nothing learned: the gradient is 0{equal}' if idle else ''}"
        )
        if self.bar:
            self._draw(step, text)
        else:
            say(f"step {step}/{self.max_steps}  {text}", row=row)

    def seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self.marks[0], self.marks[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self.max_steps - step, 0)

    def _draw(self, step: int, text: str) -> None:
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=step, description=text)
            self.bar.refresh()
