"""Processes: children with a log that end in order and never outlive their parent; and detached ones that do.

Three protections of children, because a stray trainer holds the lock of its outputs:
- `Programs` is a context manager: whatever happens inside, the children are ended (SIGTERM, then SIGKILL).
- Each child is told who its parent is (`GRAFTWORK_PARENT_PID`). On Linux it asks the kernel for SIGKILL when that
  parent dies (prctl PR_SET_PDEATHSIG), which holds for `kill -9` of the parent too; elsewhere a thread looks.
- Each child leads a session of its own, so Ctrl-C reaches only the parent, and the parent decides the order.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from graftwork.errors import ProgramFailed
from graftwork.logs import line, plain_lines, say_error

COMMAND = (sys.executable, "-m", "graftwork")
"""Starts the command line. Tests hand in programs of their own."""
PARENT_VARIABLE = "GRAFTWORK_PARENT_PID"
PR_SET_PDEATHSIG = 1
PARENT_LOOK_SECONDS = 0.5
END_GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL. Nothing is lost by the latter: files are published whole or not at all."""
SETTLE_SECONDS = 0.7
"""After a first death: time for what falls with it, so that cause and consequence are told apart."""
LAST_WORDS_LINES = 12
MEMORY_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""For glibc, which reads it when a process starts: keep what a pass on a CPU frees for the next one, instead of giving
it back to the system and getting it again zeroed, page by page. A process stays as large as its largest pass was."""


def end_with_parent() -> None:
    """In a child of `Programs`: make sure that this process does not outlive its parent. Elsewhere: nothing."""
    parent = os.environ.pop(PARENT_VARIABLE, None)  # popped: a grandchild has another parent
    if parent is None:
        return
    asked = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if not asked:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):  # it died before we could ask
        say_error("the program that started this one is gone")
        sys.exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Signals:
    """Which of SIGINT, SIGTERM, SIGHUP arrived; loops look here, so that no exception strikes in mid-cleanup."""

    received: int | None = None


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """The first signal is noted; after it the old handlers are back, so a second one acts at once."""
    signals = Signals()
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def put_back() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        signals.received = number
        put_back()

    for number in old:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        put_back()


@dataclass
class Program:
    """A child process and the part of its log that it wrote itself."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Bytes of the log that earlier starts wrote."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self.process.poll()

    def how_it_ended(self) -> str:
        code = self.exit_code
        if code is None:
            return "still runs"
        if code < 0:
            hint = " (by a person, or by the system for want of memory)" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}"

    def last_words(self) -> list[str]:
        """Its last `error:` message, continuation lines included; without one, the last lines of the log."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = plain_lines(file.read().decode(errors="replace"))
        errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        if errors:
            return lines[errors[-1] :][:LAST_WORDS_LINES]
        return lines[1:][-LAST_WORDS_LINES:]  # the first line is the header of `open_log`

    def end(self, grace_seconds: float = END_GRACE_SECONDS) -> None:
        """SIGTERM, then SIGKILL after the grace time, to the child and to what it started."""
        for number, wait_seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, None)):
            if self.exit_code is not None:
                return
            os.killpg(self.process.pid, number)
            try:
                self.process.wait(wait_seconds)
            except subprocess.TimeoutExpired:
                continue


def open_log(path: Path, title: str) -> tuple[int, int]:
    """A descriptor that appends to a log, and the log's length before this start.

    The one file that is opened for writing outside store/disk.py: a child needs a descriptor for its stdout, and the
    text is the child's, also after this process is gone. Logs are kept over restarts, parted by a line with the title.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    start = os.fstat(descriptor).st_size
    header = line(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title} ===")
    os.write(descriptor, f"{header}\n".encode())
    return descriptor, start


def start_detached(command: Sequence[str], name: str, argument: Path, log: Path) -> int:
    """Start `graftwork <name> <argument>` to live on after this process, its output appended to `log`; its pid."""
    descriptor, _ = open_log(log, f"graftwork {name} {argument}")
    environment = {key: value for key, value in os.environ.items() if key != PARENT_VARIABLE}
    return _spawn([*command, name, str(argument)], descriptor, environment).pid


def _spawn(command: Sequence[str], descriptor: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, with stdout and stderr going to `descriptor`, which is closed here.

    Python's hash seed is 0 unless `environment` has another: whatever iterates over a set of texts, such as some
    environments' tasks, then does the same in every start of a run. Freed memory is kept (`MEMORY_ENVIRONMENT`), unless
    `environment` says otherwise.
    """
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env={"PYTHONHASHSEED": "0", **MEMORY_ENVIRONMENT, **environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


@dataclass
class Programs:
    """The children of one `rl` or `serve`. Leaving the `with` ends them: orchestrator, trainer, inference."""

    logs: Path
    command: Sequence[str]
    """What starts the command line, such as [python, -m, graftwork]."""
    signals: Signals
    started: dict[str, Program] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    """When a program was first seen to have ended, in seconds of the monotonic clock."""

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("orchestrator", "trainer", "inference"):
            if name in self.started:
                self.started[name].end()

    def start(self, name: str, argument: Path) -> Program:
        """Start `graftwork <name> <argument>` with stdout and stderr going to logs/<name>.log."""
        log = self.logs / f"{name}.log"
        descriptor, log_start = open_log(log, f"graftwork {name} {argument}")
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        process = _spawn([*self.command, name, str(argument)], descriptor, environment)
        self.started[name] = Program(name, process, log, log_start)
        return self.started[name]

    def finished(self, name: str) -> bool:
        """Whether it ended well."""
        return self.started[name].exit_code == 0

    def seconds_since(self, name: str) -> float:
        """Since the end of `name` was first seen."""
        return time.monotonic() - self.ended[name]

    def check(self) -> None:
        """Raises Interrupted when a signal asked to stop, ProgramFailed when a program ended that should not have."""
        for program in self.started.values():
            if program.exit_code is not None:
                self.ended.setdefault(program.name, time.monotonic())
        if self.signals.received is not None:
            raise Interrupted(self.signals.received)
        if self._ended_badly():
            time.sleep(SETTLE_SECONDS)
            raise ProgramFailed(describe_failure(self._ended_badly()))

    def _ended_badly(self) -> list[Program]:
        """The likeliest cause first: what a signal killed, then whoever the others depend on."""
        ended = [p for p in self.started.values() if p.exit_code is not None]
        bad = [p for p in ended if p.exit_code != 0 or p.name == "inference"]
        order = ("inference", "trainer", "orchestrator")
        return sorted(bad, key=lambda p: ((p.exit_code or 0) >= 0, order.index(p.name)))


class Interrupted(Exception):
    """A signal asked `graftwork rl` or `serve` to stop: no error, so outside the error tree."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def describe_failure(bad: Sequence[Program]) -> str:
    """Who failed, how, its last words and its log; then, in short, what fell with it."""
    first, *others = bad
    lines = [f"the {first.name} {first.how_it_ended()}; its log: {first.log}"]
    lines += [f"  {first.name}: {line.removeprefix('error: ')}" for line in first.last_words()]
    for other in others:
        words = other.last_words()
        lines.append(f"  then the {other.name} {other.how_it_ended()}{': ' + words[0] if words else ''}; {other.log}")
    return "\n".join(lines)
