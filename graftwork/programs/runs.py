"""`graftwork runs`: which runs there are, how each of them does, and why those wait that wait.

look(outputs) -> Glance        what the files say (glance.py)
rows(Glance, now) -> [RunRow]  pure: what is shown of it, in order
then a table, columns or JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graftwork.errors import ConfigError
from graftwork.programs.glance import Glance, Liveness, Seated, Seen, look
from graftwork.programs.tables import table
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL

WATCH_SECONDS = 1.0
HEADER = ("id", "state", "slot", "step", "reward", "tokens/s", "share", "last batch", "reason")
RIGHT = frozenset({"slot", "step", "reward", "tokens/s", "share", "last batch"})
NOTHING = "-"


@dataclass(frozen=True)
class RunRow:
    """What is shown of one run. state: of status.json, or waiting (no trainer has acted on its orch.toml yet), unknown
    (its status.json cannot be read), removed (its folder is gone). share: of the trainer, 0 to 1."""

    id: str
    state: str
    slot: int | None = None
    step: int | None = None
    max_steps: int | None = None
    reward: float | None = None
    tokens_per_second: float | None = None
    share: float | None = None
    last_batch_age_seconds: float | None = None
    place: int | None = None
    reason: str | None = None


def main(output_dir: str, *, watch: bool, as_json: bool) -> None:
    """Print the runs of `output_dir` once, or again and again until Ctrl-C. Raises ConfigError."""
    outputs = OutputTree(Path(output_dir))
    if not outputs.root.is_dir():
        raise ConfigError(f"no folder at {output_dir}; --output-dir names the one that `graftwork serve` watches")
    on_terminal = sys.stdout.isatty() and not as_json
    if not watch:
        show(outputs, on_terminal=on_terminal, as_json=as_json)
        return
    try:
        if on_terminal:
            redraw(outputs)
        while True:
            show(outputs, on_terminal=False, as_json=as_json)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return  # the way to end it


def show(outputs: OutputTree, *, on_terminal: bool, as_json: bool) -> None:
    glance, now = look(outputs), time.time()
    if as_json:
        print(json.dumps(as_object(glance, now)), flush=True)
    elif on_terminal:
        Console().print(drawn(glance, now, cut=False))
    else:
        print("\n".join(lines(glance, now)), flush=True)


def redraw(outputs: OutputTree) -> None:
    with Live(drawn(look(outputs), time.time(), cut=True), auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(drawn(look(outputs), time.time(), cut=True), refresh=True)


# --- what is shown ----------------------------------------------------------------------------------------------------


def rows(glance: Glance, now: float) -> list[RunRow]:
    """Active runs by slot, the queue by place, what waits or is unknown, what ended, what was removed.

    now: seconds since 1970.
    """
    live = glance.liveness if glance.liveness is not None and glance.liveness.is_live(now) else None
    there = {seen.id for seen in glance.runs}
    gone = {} if glance.liveness is None else {removed.run: removed for removed in glance.liveness.removed}
    return sorted((row_of(seen, live, now) for seen in glance.runs), key=_order) + [
        RunRow(run, "removed", step=removed.step, reason="its folder is gone")
        for run, removed in sorted(gone.items())
        if run not in there
    ]


def row_of(seen: Seen, live: Liveness | None, now: float) -> RunRow:
    """live: what a trainer that is alive says of its runs."""
    state, reason = _state(seen)
    status, active = seen.status, state == "active"
    seat = (live.runs.get(seen.id) if live is not None and active else None) or Seated()
    step = seat.step if status is None or status.step is None else status.step
    if live is None and active:
        reason = "; ".join(filter(None, ["interrupted, as no trainer is running", reason]))
    if state not in TERMINAL and seen.orchestrator_error and seen.orch_digest is not None:
        reason = "; ".join(filter(None, [reason, seen.orchestrator_error]))
    return RunRow(
        seen.id,
        state,
        slot=status.slot if status is not None and active else None,
        step=step,
        max_steps=seen.max_steps,
        reward=_number(seen.metrics.get("reward")),
        tokens_per_second=_number(seen.metrics.get("tokens_per_second")) if active else None,
        share=seat.share,
        last_batch_age_seconds=None if seat.last_batch_time is None else max(0.0, now - seat.last_batch_time),
        place=status.place if status is not None and state == "queued" else None,
        reason=reason,
    )


def _state(seen: Seen) -> tuple[str, str | None]:
    """(state, reason) of a run whose folder is there."""
    status = seen.status
    if seen.status_error is not None:
        return "unknown", seen.status_error
    if seen.copy_of is not None:
        return "waiting", f"a copy of run {seen.copy_of}, which no trainer has taken up under this id"
    if status is None:
        return "waiting", seen.orch_error or "no trainer has seen it yet"
    if seen.orch_digest in (None, status.orch_digest):
        return status.state, status.reason or seen.orch_error
    if status.state == "active":
        return "active", "its orch.toml has changed, and the trainer has not acted on that yet"
    return "waiting", f"its orch.toml has changed since it was {status.state}; no trainer has acted on that yet"


def _order(row: RunRow) -> tuple[int, int, str]:
    kinds = {"active": 0, "queued": 1, "waiting": 2, "unknown": 2}
    within = row.slot if row.state == "active" else row.place
    return kinds.get(row.state, 3), sys.maxsize if within is None else within, row.id


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def headline(glance: Glance, now: float) -> str:
    """Whether a trainer is alive, and how full it is."""
    liveness = glance.liveness
    if liveness is None or not liveness.is_live(now):
        seen = "" if liveness is None else f" (the last sign of one is {age(now - liveness.time)} old)"
        return f"no trainer is running{seen}"
    slots = "" if glance.slots is None else f" of {glance.slots}"
    return f"the trainer runs (pid {liveness.pid}); {len(liveness.runs)}{slots} slots used"


# --- how it is shown --------------------------------------------------------------------------------------------------


def cells(row: RunRow) -> list[str]:
    """The columns of HEADER."""
    step = NOTHING if row.step is None else str(row.step)
    place = None if row.place is None else f"place {row.place}"
    return [
        row.id,
        row.state,
        NOTHING if row.slot is None else str(row.slot),
        step if row.max_steps is None else f"{step}/{row.max_steps}",
        NOTHING if row.reward is None else f"{row.reward:.3f}",
        NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        NOTHING if row.share is None else f"{row.share:.0%}",
        NOTHING if row.last_batch_age_seconds is None else age(row.last_batch_age_seconds),
        " ".join(": ".join(filter(None, [place, row.reason])).split()),
    ]


def age(seconds: float) -> str:
    """`12s`, `3m`, `2h`, `4d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def lines(glance: Glance, now: float) -> list[str]:
    """Plain columns; nothing is cut."""
    shown = [cells(row) for row in rows(glance, now)]
    body = table(HEADER, shown) if shown else ["no runs"]
    return [headline(glance, now), *body, *(f"note: {text}" for text in glance.ignored)]


def drawn(glance: Glance, now: float, *, cut: bool) -> Group:
    """For a terminal. cut: a run is one line, however long its reason."""
    drawing = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEADER:
        last = name == "reason"
        drawing.add_column(
            name,
            justify="right" if name in RIGHT else "left",
            no_wrap=cut or not last,
            overflow="ellipsis" if cut else "fold",
        )
    for row in rows(glance, now):
        drawing.add_row(*(Text(cell) for cell in cells(row)))  # Text: a reason may hold [brackets]
    notes = [Text(f"note: {text}") for text in glance.ignored]
    return Group(Text(headline(glance, now)), drawing if drawing.row_count else Text("no runs"), *notes)


def as_object(glance: Glance, now: float) -> dict[str, Any]:
    """`--json`."""
    liveness = glance.liveness
    trainer = {
        "alive": liveness is not None and liveness.is_live(now),
        "pid": None if liveness is None else liveness.pid,
        "seconds_since_sign": None if liveness is None else now - liveness.time,
        "slots": glance.slots,
        "slots_used": len(liveness.runs) if liveness is not None and liveness.is_live(now) else 0,
    }
    return {"trainer": trainer, "runs": [asdict(row) for row in rows(glance, now)], "ignored": list(glance.ignored)}


# --- one run of a tree ------------------------------------------------------------------------------------------------


def run_of(output_dir: str, name: str) -> RunTree:
    """The tree of a run that is there. Raises BadRunId, and ConfigError, naming those that are there."""
    outputs = OutputTree(Path(output_dir))
    tree = outputs.run(RunId.parse(name))
    if not tree.root.is_dir():
        there = ", ".join(str(other.id) for other in outputs.scan()[0]) or "none"
        raise ConfigError(f"no run {name} in {output_dir}; there are: {there}")
    return tree


def adapter_of(tree: RunTree, step: int | None) -> tuple[int, Path]:
    """(step, folder) of a run's adapter after a step, the newest if None is named. A checkpoint's goes before the
    broadcast of the same step: it brings the tokenizer along. Raises ConfigError, naming the steps that are there."""
    there = {number: tree.broadcast(number) for number in stable_steps(tree.broadcasts)}
    for number in stable_steps(tree.checkpoints):
        if (weight := tree.checkpoint(number) / "weight").is_dir():
            there[number] = weight
    if not there:
        raise ConfigError(
            f"run {tree.id}: no adapter is there yet, neither in {tree.checkpoints} nor in {tree.broadcasts}"
        )
    wanted = max(there) if step is None else step
    if wanted not in there:
        steps = ", ".join(map(str, sorted(there)))
        raise ConfigError(f"run {tree.id}: no adapter of step {wanted} is there (any more); there are steps {steps}")
    return wanted, there[wanted]


def verify_lines(reports: Sequence[dict[str, Any]]) -> list[str]:
    """`graftwork runs verify`: a line a run, or one a finding."""
    lines = []
    for report in reports:
        counts = [f"{count} {kind.replace('_', ' ')}" for kind, count in report["checked"].items() if count]
        ok = f"{report['run']}: ok, {', '.join(counts) or 'nothing to check'}"
        lines += [f"{report['run']}: {finding}" for finding in report["findings"]] or [ok]
    return lines
