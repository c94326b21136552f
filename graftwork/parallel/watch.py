"""Who died, who hangs: each rank says once a second where it is, and looks at the others when it waits for too long.

A rank that is gone breaks the connections of the others, or leaves them waiting inside a communication that Python
cannot interrupt. So a thread watches: it ends the process, with a message that names the rank that is to blame, and
torchrun ends the others and starts the job again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from graftwork.logs import say_error

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENT_BEATS = 4
"""A rank that misses so many is taken for dead or stopped."""
PACKAGE = f"{os.sep}graftwork{os.sep}"


class Store(Protocol):
    """What torch's TCPStore is used for here."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Beat:
    """What a rank says. count: of its beats. orders: how many it has begun. doing: the last of them, or that it waits.
    place: file, line and function of its main thread. who: pid and host."""

    count: int
    orders: int
    doing: str
    place: str
    who: str


class Watch:
    """Runs as a thread inside the `with`. `at` and `waits` are called by the main thread."""

    def __init__(self, rank: int, size: int, store: Store, timeout_seconds: float) -> None:
        self.rank, self.size, self.store, self.timeout_seconds = rank, size, store, timeout_seconds
        self.orders, self.doing, self.since = 0, "starting", time.monotonic()
        self.beats = 0
        self.main = threading.main_thread().ident
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.over.set()
        self.thread.join(timeout=2 * BEAT_SECONDS)

    def at(self, order: str) -> None:
        """An order begins."""
        self.orders, self.doing, self.since = self.orders + 1, order, time.monotonic()

    def waits(self) -> None:
        """The order is carried out; the next one is awaited, or decided on."""
        self.doing = f"{'deciding' if self.rank == 0 else 'waiting for an order'} after {self.doing}"

    def culprits(self) -> str:
        """Who is to blame for a communication that failed, in words. Takes a few seconds."""
        before = self._heard()
        time.sleep(SILENT_BEATS * BEAT_SECONDS)
        return blame(before, self._heard(), self.size, self.rank)

    def _run(self) -> None:
        self._beat()
        while not self.over.wait(BEAT_SECONDS):
            self._beat()
            if time.monotonic() - self.since > self.timeout_seconds:
                self._end()

    def _beat(self) -> None:
        self.beats += 1
        beat = Beat(self.beats, self.orders, self.doing, self._place(), f"pid {os.getpid()} on {os.uname().nodename}")
        try:
            self.store.set(f"beat/{self.rank}", json.dumps(beat.__dict__))
        except (RuntimeError, OSError) as error:  # torchrun is gone, and with it the store; it ends its processes
            log.warning("rank %d: cannot tell the others that it lives: %s", self.rank, error)

    def _end(self) -> None:
        """The main thread is stuck: end the process."""
        before, until = self._heard(), time.monotonic() + SILENT_BEATS * BEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS)
            self._beat()
        who = blame(before, self._heard(), self.size, self.rank)
        waited = time.monotonic() - self.since
        say_error(
            f"rank {self.rank} has been at {self.doing!r} for {waited:.0f} s (rank_timeout_seconds = "
            f"{self.timeout_seconds:g}): {who}. The job ends"
        )
        os._exit(1)

    def _heard(self) -> dict[int, Beat]:
        """The last beat of every rank that has said anything."""
        found = {}
        try:
            for rank in range(self.size):
                if self.store.check([f"beat/{rank}"]):
                    found[rank] = Beat(**json.loads(self.store.get(f"beat/{rank}")))
        except (RuntimeError, OSError) as error:
            log.warning("rank %d: cannot ask for the others: %s", self.rank, error)
        return found

    def _place(self) -> str:
        """Where the main thread is: its innermost frame in this package."""
        frame = sys._current_frames().get(self.main or 0)
        while frame is not None and PACKAGE not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            return "outside Graftwork"
        file = frame.f_code.co_filename.rpartition(PACKAGE)[2]
        return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def blame(before: Mapping[int, Beat], after: Mapping[int, Beat], size: int, judge: int) -> str:
    """Who is to blame, from two rounds of beats a few seconds apart, in words. Pure.

    First those that say nothing more, then those that are behind the others, then rank 0 if all wait for it; else
    nobody in particular, and where everybody is.
    """
    silent = [r for r in range(size) if r != judge and (r not in after or (r in before and before[r] == after[r]))]
    if silent:
        return f"{_named(silent, after)} {_verb(silent)} silent: killed, stopped, or the machine is gone"
    first = min(beat.orders for beat in after.values())
    behind = [rank for rank, beat in sorted(after.items()) if beat.orders == first]
    if len(behind) < len(after):
        return f"{_named(behind, after)} {_verb(behind)} behind the others"
    if 0 in after and all("waiting" in beat.doing for rank, beat in after.items() if rank):
        return f"{_named([0], after)} gives no order"
    return f"everybody is at the same order: {_named(sorted(after), after)}"


def _named(ranks: Sequence[int], beats: Mapping[int, Beat]) -> str:
    return ", ".join(
        f"rank {rank} ({beats[rank].who}, {beats[rank].doing}, {beats[rank].place})"
        if rank in beats
        else f"rank {rank}"
        for rank in ranks
    )


def _verb(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"
