"""64 runs on 8 slots in one `graftwork serve`, with `graftwork runs` asked all along."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.programs.verify import verify_run
from graftwork.store.layout import OutputTree, RunId

EXAMPLE = Path("examples/many_runs")
TIMEOUT_SECONDS = 3000.0
ASK_SECONDS = 3.0
COMMAND = (sys.executable, "-m", "graftwork")


@dataclass
class Crowd:
    """adapter: what every run starts from, through the trainer's own door; None: fresh.

    tables: what `graftwork runs` printed, from the first time to the last. states: how many runs were in which state,
    each time `graftwork runs --json` was asked. rows: what it said last.
    """

    folder: Path
    runs: int
    slots: int
    adapter: Path | None = None
    flags: Sequence[str] = (
        "--max_steps", "3", "--sampling.prompts_per_step", "4", "--sampling.samples_per_prompt", "4",
        "--init_adapter_path", "null",
    )  # fmt: skip
    tables: list[str] = field(default_factory=list)
    states: list[Counter[str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outputs(self) -> OutputTree:
        return OutputTree(self.folder / "outputs")

    @property
    def names(self) -> list[str]:
        return [f"r{number:02d}" for number in range(self.runs)]

    def go(self) -> None:
        """Raises TimeoutError when they do not all end, RuntimeError when a command fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        where = str(self.outputs.root)
        serve = [*COMMAND, "serve", str(EXAMPLE / "serve.toml"), "--output_dir", where]
        serve += ["--trainer.slots", str(self.slots)]
        serve += [] if self.adapter is None else ["--trainer.init_adapter_path", str(self.adapter)]
        with (self.folder / "serve.log").open("ab") as log:
            server = subprocess.Popen(serve, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            end = time.monotonic() + TIMEOUT_SECONDS
            while not self.outputs.serve_json.exists():
                self._sleep_until(end)
            ids = [flag for name in self.names for flag in ("--id", name)]
            self._graftwork("submit", str(EXAMPLE / "run.toml"), *ids, "--output-dir", where, *self.flags)
            while not self._ask():
                self._sleep_until(end)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)

    def _ask(self) -> bool:
        """Look at the table, and at the same as JSON; whether every run has ended."""
        where = ("--output-dir", str(self.outputs.root))
        self.tables.append(self._graftwork("runs", *where))
        self.rows = json.loads(self._graftwork("runs", *where, "--json"))["runs"]
        self.states.append(Counter(row["state"] for row in self.rows))
        waiting = {"queued", "active", "waiting"}
        return len(self.rows) == self.runs and not waiting & {row["state"] for row in self.rows}

    def _graftwork(self, *arguments: str) -> str:
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise RuntimeError(f"graftwork {arguments[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def _sleep_until(self, end: float) -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"the runs did not end within {TIMEOUT_SECONDS:g} s: {self.states[-1:]}")
        time.sleep(ASK_SECONDS)

    def finished(self) -> int:
        return sum(row["state"] == "finished" for row in self.rows)

    def verified(self) -> int:
        """Runs in whose files `graftwork runs verify` finds nothing."""
        return sum(not verify_run(self.outputs.run(RunId(name))).findings for name in self.names)

    def most_active(self) -> int:
        return max(states["active"] for states in self.states)
