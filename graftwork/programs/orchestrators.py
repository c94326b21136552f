"""Orchestrators that nobody waits for: start one, find the one that holds a run, end it.

A run's orchestrator holds a lock in its folder, and the lock's file names its pid. The pid alone proves nothing (a
copied folder brings another run's, an old one may name a process of today), so none is signalled without the lock held.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from graftwork.errors import Busy, ProgramFailed
from graftwork.programs.processes import END_GRACE_SECONDS, start_detached
from graftwork.programs.start import is_held
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import Status

HOLDER = re.compile(r"the orchestrator of run (?P<run>[a-z0-9_-]+), pid (?P<pid>[1-9][0-9]*)\s*")
LOCK_TRIES = 50
LOCK_POLL_SECONDS = 0.1


def start_orchestrator(disk: Disk, tree: RunTree, command: Sequence[str]) -> int:
    """Start the run's orchestrator, to live on when this command has ended; its pid."""
    disk.make_folder(tree.logs)
    return start_detached(command, "orchestrator", tree.root, tree.logs / "orchestrator.log")


def end_orchestrator(tree: RunTree) -> int | None:
    """SIGTERM, then SIGKILL after a grace time; the pid that was ended, or None when none was there.

    Raises Busy when somebody else holds the lock, ProgramFailed when the process cannot be ended from here.
    """
    pid = live_orchestrator(tree)
    if pid is None:
        return None
    for number in (signal.SIGTERM, signal.SIGKILL):
        _send(pid, number, tree)
        if wait_until_gone(tree, pid, END_GRACE_SECONDS):
            return pid
    raise ProgramFailed(
        f"run {tree.id}: {tree.orchestrator_lock} is held by pid {pid}, and no such process could be ended here; "
        "if it runs on another machine, end it there"
    )


def wait_until_gone(tree: RunTree, pid: int, seconds: float) -> bool:
    """Whether `pid` let go of the run's lock within this time."""
    deadline = time.monotonic() + seconds
    while live_orchestrator(tree) == pid:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOCK_POLL_SECONDS)
    return True


def live_orchestrator(tree: RunTree) -> int | None:
    """The pid of the orchestrator that holds the run's lock; None when nobody does.

    Raises Busy when somebody else does. The text is read twice: who has just taken the lock has not written it yet.
    """
    for _ in range(LOCK_TRIES):
        if not is_held(tree.orchestrator_lock):
            return None
        pid = pid_in(tree)
        time.sleep(LOCK_POLL_SECONDS)
        if pid is not None and pid_in(tree) == pid and is_held(tree.orchestrator_lock):
            return pid
    raise Busy(f"run {tree.id}: {tree.orchestrator_lock} is held by somebody who is not its orchestrator")


def pid_in(tree: RunTree) -> int | None:
    """The pid that the run's lock file names, alive or not; None when it names none of this very run."""
    run, pid = _last_holder(tree)
    return pid if run == str(tree.id) else None


def copied_from(tree: RunTree, status: Status | None) -> str | None:
    """The run that a folder was copied from, while it is no more than a copy: no orchestrator has run in it since.

    Its status names that run until a trainer sees the copy and writes one of its own; its lock file names it longer.
    """
    run, _ = _last_holder(tree)
    if run == str(tree.id):
        return None
    return status.run if status is not None and status.run != str(tree.id) else run


def _last_holder(tree: RunTree) -> tuple[str | None, int | None]:
    """(run, pid) of the orchestrator that took the lock last."""
    try:
        holder = HOLDER.fullmatch(tree.orchestrator_lock.read_text(errors="replace"))
    except OSError:
        return None, None
    return (None, None) if holder is None else (holder["run"], int(holder["pid"]))


def is_alive(pid: int) -> bool:
    """Whether there is such a process on this machine, and more of it than its exit code."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, OverflowError):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True  # no /proc here


def _send(pid: int, number: int, tree: RunTree) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended, or it is another machine's
    except PermissionError:
        raise ProgramFailed(f"run {tree.id}: its orchestrator (pid {pid}) belongs to another user; not ended") from None
