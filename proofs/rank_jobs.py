"""`graftwork trainer` of several ranks, as real processes, on the three runs of workload.py; fed as it goes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.config.load import dump
from graftwork.config.section import ModelConfig
from graftwork.programs.verify import verify_run
from graftwork.store.layout import OutputTree
from proofs.killing import alive, children_of
from proofs.workload import Outcome, feed, outcome_of, trainer_config, trees_of, unfinished, versions_in, write_run

POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 600.0
"""Of a whole job; it takes some tens of seconds."""


@dataclass
class Job:
    """root: becomes the output tree. settings: of the trainer."""

    root: Path
    model: ModelConfig
    adapter: Path
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs, self.log = OutputTree(self.root), self.root.with_suffix(".log")
        self.config = self.root.with_suffix(".toml")
        for tree in trees_of(self.outputs):
            write_run(tree, self.model, self.adapter, history=True)
        config = trainer_config(self.outputs, self.model, exit_when_done=True, ranks=self.ranks, **self.settings)
        self.config.write_bytes(dump(config))

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """torchrun, or the trainer itself; it does not outlive the `with`."""
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", "graftwork", "trainer", str(self.config)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            yield process
        finally:
            process.kill()  # its ranks die with it
            process.wait()

    def run(self, meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda _: None) -> Job:
        """To the end; `meanwhile` is called again and again."""
        end = time.monotonic() + TIMEOUT_SECONDS
        with self.started() as process:
            while process.poll() is None:
                assert time.monotonic() < end, f"not done after {TIMEOUT_SECONDS} s: {self.tail}"
                feed(trees_of(self.outputs))
                meanwhile(process)
                time.sleep(POLL_SECONDS)
        assert process.returncode == 0, self.tail
        return self

    @property
    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def outcomes(self) -> dict[str, Outcome]:
        return {str(tree.id): outcome_of(tree) for tree in trees_of(self.outputs)}

    def wrong(self) -> list[str]:
        """Runs that are not finished, and what `graftwork runs verify` finds."""
        findings = [f"run {t.id}: {text}" for t in trees_of(self.outputs) for text in verify_run(t).findings]
        return [*unfinished(self.outputs), *findings]


def rank_pids(torchrun: int) -> list[int]:
    """The ranks' processes, in order; empty while they are not all there."""
    pids = [pid for pid in children_of(torchrun) if b"graftwork" in _command(pid)]
    ranks = {_environment(pid).get(b"RANK"): pid for pid in pids}
    return [ranks[name] for name in sorted(name for name in ranks if name is not None)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _environment(pid: int) -> dict[bytes, bytes]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)


@dataclass
class Strike:
    """Send a signal to one rank once so many versions are published.

    at, gone_at   when that was, and when none of that start's ranks was left, in seconds of the monotonic clock
    """

    job: Job
    rank: int
    versions: int
    number: int = signal.SIGKILL
    at: float | None = None
    gone_at: float | None = None
    struck: list[int] = field(default_factory=list)

    def __call__(self, torchrun: subprocess.Popen[bytes]) -> None:
        if self.at is None and versions_in(self.job.outputs) >= self.versions:
            pids = rank_pids(torchrun.pid)
            if len(pids) == self.job.ranks:
                os.kill(pids[self.rank], self.number)
                self.at, self.struck = time.monotonic(), pids
        elif self.at is not None and self.gone_at is None and not any(alive(pid) for pid in self.struck):
            self.gone_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """From the signal to the end of that start of the job."""
        assert self.at is not None and self.gone_at is not None, "the job ended before anything was struck"
        return self.gone_at - self.at

    def named(self) -> str | None:
        """The message that names the rank; None when there is none."""
        lines = [line for line in self.job.log.read_text().splitlines() if line.startswith("error: ")]
        return next((line for line in lines if re.search(rf"rank {self.rank} \(.*(silent|behind)", line)), None)
