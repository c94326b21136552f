"""The story of alpha, beta and gamma: three warm-started runs of different rates and ranks on a trainer of two slots.

    alpha and beta train, gamma is queued
    alpha's orchestrator is killed after step 10; its step_10 checkpoint is copied to run_alpha2, which asks to resume;
    the folder run_alpha goes away
    gamma, first in line, gets the slot, alpha2 waits
    beta finishes at 20, is copied to run_beta2 and goes on to 25

Told with the command line and real processes, then checked from the files: who was where when, what was learnt, that
each run's recorded batches give the same digests alone on a fresh trainer, and that every chain holds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from graftwork.config.load import load
from graftwork.config.schema import TrainerConfig
from graftwork.model.base import load_base
from graftwork.programs.verify import verify_run
from graftwork.store.files import is_stable, read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import Status, read_status
from proofs.replay import replay

EXAMPLE = Path("examples/many_runs")
RATES_AND_RANKS = {"alpha": (2e-3, 16), "beta": (1.5e-3, 20), "gamma": (2.5e-3, 24)}
KILL_AFTER, COPIED, END, MORE = 10, 10, 20, 25
ENDLESS = 1000
"""alpha does not end by itself, however long gamma's converter takes."""
REWARD_BAR = 0.65
REWARD_STEPS = 3
"""The last reward is the mean of this many steps: one batch's mean is noisy."""
TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.02
GAMMA_FIRST = "gamma had the slot before alpha2"


@dataclass
class Story:
    """Where it happens, and what was seen on the way. `learnt`: files of a removed run, kept outside the tree."""

    folder: Path
    prompts: int
    flags: Sequence[str] = ()
    seen: dict[str, bool] = field(default_factory=dict)

    @property
    def outputs(self) -> OutputTree:
        return OutputTree(self.folder / "outputs")

    @property
    def kept_alpha(self) -> RunTree:
        return RunTree.at(self.folder / "run_alpha")

    def tree(self, name: str) -> RunTree:
        return self.outputs.run(RunId(name))

    def status(self, name: str) -> Status | None:
        return read_status(self.tree(name))

    def is_at(self, name: str, state: str, step: int = 0) -> bool:
        status = self.status(name)
        return status is not None and status.state == state and (status.step or 0) >= step

    # --- telling ------------------------------------------------------------------------------------------------------

    def tell(self, adapter: Path) -> None:
        """Raises TimeoutError, naming what did not happen, and CommandFailed."""
        with self.serving():
            # One after the other: a run whose step_0 is not converted yet lets those behind it pass.
            self.submit("alpha", adapter, "--max_steps", str(ENDLESS))
            self.wait("alpha is active", lambda: self.is_at("alpha", "active"))
            self.submit("beta", adapter)
            self.wait("beta is active", lambda: self.is_at("beta", "active"))
            self.submit("gamma", adapter)
            self.seen["gamma is queued, first in line"] = self.wait(
                "gamma is queued", lambda: (status := self.status("gamma")) is not None and status.place == 1
            )
            self.wait("alpha's step 10", lambda: is_stable(self.tree("alpha").checkpoint(KILL_AFTER)))
            self.kill_orchestrator("alpha")
            self.copy_checkpoint("alpha", COPIED, "alpha2")
            self.submit("alpha2", None, "--resume", "true")
            self.wait("alpha2 is queued", lambda: self.is_at("alpha2", "queued"))
            self.tree("alpha").root.rename(self.kept_alpha.root)
            self.wait("gamma is active", lambda: self.is_at("gamma", "active"))
            self.seen[GAMMA_FIRST] = self.is_at("alpha2", "queued")
            self.wait("beta has finished", lambda: self.is_at("beta", "finished", END))
            shutil.copytree(self.tree("beta").root, self.tree("beta2").root)
            self.submit("beta2", None, "--resume", "true", "--max_steps", str(MORE))
            for name, step in (("alpha2", END), ("gamma", END), ("beta2", MORE)):
                self.wait(f"{name} has finished", lambda n=name, s=step: self.is_at(n, "finished", s))  # type: ignore[misc]

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = [
            "--output_dir",
            str(self.outputs.root),
            "--trainer.slots",
            "2",
            "--trainer.threads",
            "1",
            "--lora.max_rank",
            "24",
        ]
        command = [sys.executable, "-m", "graftwork", "serve", str(EXAMPLE / "serve.toml"), *flags]
        with (self.folder / "serve.log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            self.wait("serve is up", self.outputs.serve_json.exists)
            yield
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)

    def submit(self, name: str, adapter: Path | None, *flags: str) -> None:
        rate, rank = RATES_AND_RANKS[name.removesuffix("2")]
        start = [] if adapter is None else ["--init_adapter_path", str(adapter)]
        self.command(
            "submit", str(EXAMPLE / "run.toml"), "--id", name, "--output-dir", str(self.outputs.root), *start,
            "--optimizer.learning_rate", str(rate), "--adapter.rank", str(rank),
            *([] if "--max_steps" in flags else ["--max_steps", str(END)]),
            "--sampling.prompts_per_step", str(self.prompts), "--retention.history", "true",
            "--retention.checkpoints", str(ENDLESS), *self.flags, *flags,
        )  # fmt: skip

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "graftwork", *arguments], capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            raise RuntimeError(f"graftwork {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def kill_orchestrator(self, name: str) -> None:
        holder = self.tree(name).orchestrator_lock.read_text()  # the orchestrator of run x, pid 123
        os.kill(int(holder.rpartition(" ")[2]), signal.SIGKILL)

    def copy_checkpoint(self, name: str, step: int, other: str) -> None:
        shutil.copytree(self.tree(name).checkpoint(step), self.tree(other).checkpoint(step))

    def wait(self, what: str, happened: Callable[[], bool]) -> bool:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {TIMEOUT_SECONDS:g} s; see {self.folder}/serve.log")
            time.sleep(POLL_SECONDS)
        return True

    # --- checking -----------------------------------------------------------------------------------------------------

    def rewards(self) -> dict[str, float]:
        """Mean reward of the last steps of the runs that went to step 20 or further."""
        found = {}
        for name in ("beta", "gamma", "alpha2", "beta2"):
            rows = read_lines(self.tree(name).metrics_jsonl)
            found[name] = sum(row["reward"] for row in rows[-REWARD_STEPS:]) / REWARD_STEPS
        return found

    def trees(self) -> list[RunTree]:
        return [self.kept_alpha, *(self.tree(name) for name in ("beta", "gamma", "alpha2", "beta2"))]

    def replayed(self) -> dict[str, list[str]]:
        """What differs when each run's batches are learnt alone."""
        config = load(TrainerConfig, self.outputs.logs / "trainer.toml")
        if config.threads:
            torch.set_num_threads(config.threads)
        base = load_base(config.model, config.lora)
        return {str(tree.id): replay(tree, config, base, self.folder / f"replay_{tree.id}") for tree in self.trees()}

    def verified(self) -> dict[str, list[str]]:
        """What `graftwork runs verify` finds."""
        return {str(tree.id): verify_run(tree).findings for tree in self.trees()}
