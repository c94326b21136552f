"""`graftwork monitor`: forwards the metrics of runs to TensorBoard, W&B or trackio.

A monitor reads the logs that trainer and orchestrator write anyway, and is known to neither: it can start late, be
killed and start again. It remembers nothing of its own. At its start it asks what the target's folder holds already,
and forwards the rest. Where that is not what the log says (a resume cut the log back, and the steps since were learnt
again), the target begins again and gets the whole log: what it shows last is always what the log says.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from graftwork.errors import BadRunId, ConfigError
from graftwork.programs.monitors.to_tensorboard import TensorBoard
from graftwork.programs.monitors.to_trackio import Trackio
from graftwork.programs.monitors.to_wandb import WeightsAndBiases
from graftwork.programs.orch_toml import is_settled
from graftwork.programs.plot import RunLogs, find_all, steps_of
from graftwork.programs.report import shown
from graftwork.programs.start import is_held
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree

POLL_SECONDS = 1.0
STEP_MAX = 2**63 - 1

Values = dict[tuple[int, str], float]
"""By step and name: `train/reward`, `heldout/reward`."""


class Monitor(Protocol):
    """Somewhere to forward to. `run` is one of the names that it was made with, each with the folder to write into."""

    def logged(self, run: str) -> Values:
        """What is there, since it began again last."""
        ...

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None: ...

    def begin_again(self, run: str) -> None:
        """What is there no longer holds; all of it comes anew."""
        ...

    def close(self) -> None:
        """All that was logged is on disk when this returns."""
        ...

    def hint(self) -> str:
        """The command that shows what was forwarded."""
        ...


MONITORS: Mapping[str, Callable[[Mapping[str, Path]], Monitor]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio,
}  # fmt: skip


def main(output_dir: str, names: Sequence[str], to: str, *, follow: bool) -> None:
    """follow: until every run has ended, or Ctrl-C. Raises ConfigError, and Busy when another one forwards there."""
    if to not in MONITORS:
        raise ConfigError(f"--to {to} is not known; there are: {', '.join(MONITORS)}")
    runs = find_all(output_dir, names)
    trees = [tree_of(run) for run in runs] if follow else []
    folders = {run.name: run.folder / "monitor" / to for run in runs}
    disk = Disk()
    with ExitStack() as stack:
        for folder in folders.values():
            stack.callback(disk.claim(folder / ".lock", "graftwork monitor").release)
        monitor = MONITORS[to](folders)
        stack.callback(monitor.close)
        forwarders = [Forwarder(run, monitor) for run in runs]
        try:
            forward_all(forwarders, trees)
        except KeyboardInterrupt:
            if not follow:
                raise
    for forwarder in forwarders:
        print(f"{forwarder.run.name}: {forwarder.forwarded or 'no'} new steps")
    print(monitor.hint())


def tree_of(run: RunLogs) -> RunTree:
    """Raises ConfigError where the logs lie in no run's folder: those of `graftwork sft`, or a copy."""
    try:
        return RunTree.at(run.folder)
    except BadRunId:
        raise ConfigError(f"--follow: {shown(run.folder)} is no run's folder, so nothing says when it ends") from None


def forward_all(forwarders: Sequence[Forwarder], trees: Sequence[RunTree]) -> None:
    """Again and again, until each of `trees` has ended; once where there are none."""
    while True:
        over = all(has_ended(tree) for tree in trees)  # asked first: then nothing can come after
        for forwarder in forwarders:
            forwarder.forward()
        if over:
            return
        time.sleep(POLL_SECONDS)


def has_ended(tree: RunTree) -> bool:
    """Whether nothing more comes: the run's folder is gone; or the trainer said so of the orch.toml that is there now,
    and no orchestrator is left, which evaluates the last version after that."""
    if not tree.root.is_dir():
        return True
    try:
        settled = is_settled(tree)
    except FileNotFoundError:  # it ended, and has no orch.toml to go on under
        settled = True
    return settled and not is_held(tree.orchestrator_lock)


@dataclass
class Forwarder:
    """Brings one run's logs to a monitor."""

    run: RunLogs
    monitor: Monitor
    forwarded: int = 0
    """Steps, counted again when something of them came later."""
    there: Values = field(init=False)
    stamps: list[tuple[int, int, int] | None] = field(init=False, default_factory=list)
    """Of the logs when they were read last."""

    def __post_init__(self) -> None:
        self.there = self.monitor.logged(self.run.name)

    def forward(self) -> None:
        logs = {"train": self.run.metrics, "heldout": self.run.evals}
        stamps = [stamp(log) for log in logs.values()]
        if stamps == self.stamps:
            return
        self.stamps = stamps
        now = {room: values_of(steps_of(log), room) for room, log in logs.items()}
        self._begin_again_if_it_went_back(now)
        new = sorted((key, value) for values in now.values() for key, value in values.items() if key not in self.there)
        for step, group in groupby(new, key=lambda item: item[0][0]):
            self.monitor.log(self.run.name, step, {name: value for (_, name), value in group})
            self.forwarded += 1
        self.there.update(new)

    def _begin_again_if_it_went_back(self, now: Mapping[str, Values]) -> None:
        """A log without a step says nothing about what is there: it was removed, or was cut back to the start and its
        first step is still to come."""
        stale = [
            step
            for (step, name), value in self.there.items()
            if (values := now[name.partition("/")[0]]) and not is_same(value, values.get((step, name)))
        ]
        if stale:
            print(
                f"{self.run.name}: its log is another one from step {min(stale)} on than the one that was forwarded "
                "(the run went back); all of it is forwarded anew",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self.monitor.begin_again(self.run.name)
            self.there.clear()


def is_same(there: float, value: float | None) -> bool:
    """Whether a value came back as it went in. TensorBoard keeps 32 bits of it: what is larger is infinite there."""
    return value is not None and (math.isinf(there) or math.isclose(there, value, rel_tol=1e-6, abs_tol=1e-37))


def values_of(rows: Sequence[Mapping[str, Any]], room: str) -> Values:
    """The finite numbers in the lines of a log; true and false count as 1 and 0."""
    return {
        (row["step"], f"{room}/{key}"): float(value)
        for row in rows
        if 0 <= row["step"] <= STEP_MAX
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and abs(value) <= sys.float_info.max
    }


def stamp(log: Path) -> tuple[int, int, int] | None:
    """Another one when the file was appended to or replaced; None when it is not there."""
    try:
        facts = log.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
