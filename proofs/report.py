"""The form of `proof/<name>.json`, and who ran it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.store.disk import Disk


def commit() -> str:
    """The commit that is checked out, with `+` when the tree has changes; "unknown" outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return (head or "unknown") + ("+" if git("status", "--porcelain") else "")


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


@dataclass
class Proof:
    """Collects figures and failures; `ok` is false when anything fell short or was skipped."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def check(self, held: bool, otherwise: str) -> None:
        if not held:
            self.failures.append(otherwise)
            print(f"  FELL SHORT: {otherwise}", flush=True)

    def count(self, what: str, asked: int, done: int) -> None:
        """Record what was asked and what was done; fewer is a failure."""
        self.figures[what] = {"asked": asked, "done": done}
        self.check(done >= asked, f"{what}: {done} of {asked}")

    def write(self, folder: Path) -> bool:
        """Write the report; whether all held."""
        ok = not self.failures
        report = {
            "name": self.name, "ok": ok, "commit": commit(), "machine": machine(),
            "seconds": round(time.monotonic() - self.started, 1), "figures": self.figures, "failures": self.failures,
        }  # fmt: skip
        path = folder / f"{self.name}.json"
        Disk().publish_json(path, report)
        print(f"{path}: {'ok' if ok else 'NOT OK'} after {report['seconds']} s", flush=True)
        return ok


def run_proof(proof: Proof, work: Callable[[Proof], None], folder: Path = Path("proof")) -> int:
    """Run `work`, write the report whatever happens, return the exit code."""
    try:
        work(proof)
    except BaseException as error:
        proof.failures.append(f"it ended early: {type(error).__name__}: {error}")
        raise
    finally:
        ok = proof.write(folder)
    return 0 if ok else 1
