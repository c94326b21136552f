"""The form of `proof/<name>.json`, and who ran it."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.store.disk import Disk


def commit(*, but: Sequence[str] = ()) -> str:
    """The commit that is checked out, with `+` when the tree has changes, but in these folders; "unknown" outside
    git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return (head or "unknown") + (
        "+" if git("status", "--porcelain", "--", ".", *(f":!{folder}" for folder in but)) else ""
    )


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


Part = Callable[[Proof, Path, int], None]
"""A part of a proof: gets the folder that it may write into, and the seed."""


def run_parts(
    name: str, about: str | None, parts: Mapping[str, Part], prepare: Callable[[Path], None] | None = None
) -> int:
    """A proof in parts, as a command: `--seed`, `--folder`, `--only PART`; the exit code. prepare: makes what the parts
    share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(f"outputs/proof_{name}"))
    parser.add_argument("--only", choices=parts, help="one part; the report is then not ok, as the others were skipped")
    options = parser.parse_args()
    print(f"proof {name}, seed {options.seed}: replay with --seed {options.seed}", flush=True)

    def prove(proof: Proof) -> None:
        folder: Path = options.folder.absolute()
        if folder.exists():
            Disk().quarantine(folder, folder.parent / ".trash")
        folder.mkdir(parents=True)
        if prepare is not None:
            prepare(folder)
        proof.figures["seed"] = options.seed
        seconds = proof.figures["seconds"] = {}
        for title, part in parts.items():
            if options.only not in (None, title):
                proof.check(False, f"{title}: skipped")
                continue
            began = time.monotonic()
            part(proof, folder, options.seed)
            seconds[title] = round(time.monotonic() - began, 1)
            print(f"{title}: {seconds[title]} s", flush=True)

    return run_proof(Proof(name), prove)
