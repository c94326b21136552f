"""Kill a `graftwork rl` with all its processes at a chosen kind of moment, and see afterwards which kind it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graftwork.store.disk import STAGING_PREFIX
from graftwork.store.files import is_stable
from graftwork.store.layout import RunTree

Moment = Literal["sampling", "training", "checkpoint"]
MOMENTS: tuple[Moment, ...] = ("sampling", "training", "checkpoint")
POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Kill:
    """Strike at `moment` of the first step from `step` on that has one, `delay_seconds` into it."""

    moment: Moment
    step: int
    delay_seconds: float


def draw_kills(rng: random.Random, last_step: int, first: Moment) -> list[Kill]:
    """One to three kills in ascending steps; the first has the given moment."""
    count = rng.randint(1, 3)
    steps = sorted(rng.sample(range(1, last_step), count))
    moments = [first, *rng.choices(MOMENTS, k=count - 1)]
    return [Kill(m, s, 0.0 if m == "checkpoint" else rng.random() * 0.3) for m, s in zip(moments, steps, strict=True)]


def start_rl(config: Path, flags: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        command = [sys.executable, "-m", "graftwork", "rl", str(config), *flags]
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def strike(process: subprocess.Popen[bytes], tree: RunTree, kill: Kill) -> Moment | None:
    """Wait for the moment, kill -9 the supervisor and its programs; the moment that the files show, None if it ended
    before one came."""
    if not _wait_for(process, tree, kill):
        return None
    time.sleep(kill.delay_seconds)
    children = children_of(process.pid)
    for pid in [*children, process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    wait_until_gone(children)
    return moment_of(tree)


def children_of(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in text.split()]


def wait_until_gone(pids: Sequence[int], timeout_seconds: float = 30.0) -> None:
    """Wait for killed processes to be gone, so that no lock of theirs is left."""
    end = time.monotonic() + timeout_seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def moment_of(tree: RunTree) -> Moment:
    """What a trainer and an orchestrator that are now dead were doing, from what they left."""
    if staged_checkpoint(tree):
        return "checkpoint"
    step = newest(tree.broadcasts)
    return "training" if is_stable(tree.batch(step + 1)) else "sampling"


def staged_checkpoint(tree: RunTree) -> bool:
    return any(
        not path.name.startswith(f"{STAGING_PREFIX}step_0-") for path in tree.checkpoints.glob(f"{STAGING_PREFIX}*")
    )


def newest(parent: Path) -> int:
    """The last published step; -1 if there is none."""
    step = -1
    while is_stable(parent / f"step_{step + 1}"):
        step += 1
    return step


def _wait_for(process: subprocess.Popen[bytes], tree: RunTree, kill: Kill) -> bool:
    """Whether the moment came while the process lived."""
    while process.poll() is None:
        if is_stable(tree.broadcast(kill.step)) and _is_moment(tree, kill):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _is_moment(tree: RunTree, kill: Kill) -> bool:
    match kill.moment:
        case "checkpoint":
            return staged_checkpoint(tree)
        case "training":
            step = max(newest(tree.broadcasts), kill.step)
            return is_stable(tree.batch(step + 1)) and not is_stable(tree.broadcast(step + 1))
        case "sampling":
            return not is_stable(tree.batch(max(newest(tree.broadcasts), kill.step) + 1))
