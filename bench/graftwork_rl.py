"""Our side of rl_vs_trl and reward_vs_trl: `graftwork serve` and `graftwork submit` as a person would type them.

Both start at the same moment: `submit` is told the address, so that the runs' folders and orchestrators are there
when the trainer is. The runs start from the trainer's own door (`trainer.init_adapter_path`), which is read once,
instead of through a converter each. Batch k is sampled from version k - 1 (lockstep): with several runs one samples
while another learns, so that no lag is needed to keep both busy.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch

from bench.bases import TINY
from bench.recipe import Recipe
from graftwork.programs.orchestrators import end_orchestrator
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import TERMINAL, read_status

FOLDER = Path("outputs/bench/rl")
OPTIONS = {"min_length": 6, "max_length": 10}
"""Of the environment reverse_text, as in examples/reverse_text."""
POLL_SECONDS = 0.05
GIVE_UP_SECONDS = 1800.0


def sft_adapter(device: torch.device) -> Path:
    """The adapter that both sides start from: that of examples/reverse_text/sft.toml, made once."""
    out = FOLDER / "sft"
    if not (out / "adapter" / "adapter_config.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        _graftwork("sft", "examples/reverse_text/sft.toml", "--output_dir", str(out), "--model.device", str(device))
    return (out / "adapter").absolute()


def _graftwork(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "graftwork", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"graftwork {arguments[0]} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


@dataclass(frozen=True, kw_only=True)
class Work(Recipe):
    """What each run does. seeds: one a run. trainer_threads, inference_threads: of matrix products on a CPU."""

    device: torch.device
    seeds: Sequence[int]
    skip_equal_groups: bool = False
    trainer_threads: int = 1
    inference_threads: int = 1


@dataclass
class Told:
    """What came of it, seconds from the start of the first process. rows: of metrics.jsonl, a list a run."""

    admitted: float = 0.0
    """All runs hold a slot, and their first versions are published."""
    ended: float = 0.0
    rows: list[list[dict[str, Any]]] = field(default_factory=list)
    reached: list[float | None] = field(default_factory=list)
    """When each run's last row had come, or the row that `until` waited for."""


Until = Callable[[list[dict[str, Any]]], bool]
"""Whether a run whose rows these are has come far enough."""


def train(work: Work, folder: Path, until: Until | None = None) -> Told:
    """Train the runs beside one another, to their last step or until each has come far enough."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    url, adapter = f"http://127.0.0.1:{(port := _free_port())}", sft_adapter(work.device)
    serve, run = _write(folder, work, adapter, port), _write_run(folder, work, url)
    outputs, told = OutputTree(folder.absolute()), Told()
    trees = [outputs.run(RunId.parse(f"seed{seed}")) for seed in work.seeds]
    began = time.monotonic()
    serving = _start(folder, "serve", str(serve))
    try:
        submits = [
            _start(folder, "submit", str(run), "--id", str(tree.id), "--seed", str(seed))
            for tree, seed in zip(trees, work.seeds, strict=True)
        ]
        _watch(trees, told, began, until or (lambda _: False), [serving])
        for submit in submits:
            submit.wait()
    finally:
        serving.send_signal(signal.SIGTERM)
        for tree in trees:
            with contextlib.suppress(FileNotFoundError):
                end_orchestrator(tree)
        serving.wait()
    return told


def _watch(
    trees: list[RunTree], told: Told, began: float, until: Until, must_live: list[subprocess.Popen[str]]
) -> None:
    told.reached = [None] * len(trees)
    ended = [False] * len(trees)
    while not all(ended):
        time.sleep(POLL_SECONDS)
        now = time.monotonic() - began
        states = [read_status(tree) for tree in trees]
        told.rows = [_rows(tree) for tree in trees]
        if not told.admitted and all(status is not None and status.start_step is not None for status in states):
            told.admitted = now
        for number, (status, rows) in enumerate(zip(states, told.rows, strict=True)):
            if status is not None and status.state in TERMINAL and status.state != "finished":
                raise RuntimeError(f"run {trees[number].id} {status.state}: {status.reason}")
            if not ended[number] and until(rows):
                told.reached[number], ended[number] = now, True
            ended[number] = ended[number] or (status is not None and status.state == "finished")
        if any(process.poll() is not None for process in must_live) or now > GIVE_UP_SECONDS:
            raise RuntimeError(f"graftwork serve ended, or is not done after {now:.0f} s; see {trees[0].root.parent}")
    told.ended = time.monotonic() - began


def _rows(tree: RunTree) -> list[dict[str, Any]]:
    try:
        lines = tree.metrics_jsonl.read_text().split("\n")[:-1]  # the last may be half a line
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    with (folder / f"{arguments[0]}.out").open("a") as out:
        command = [sys.executable, "-m", "graftwork", *arguments]
        return subprocess.Popen(command, stdout=out, stderr=out, text=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _model(device: torch.device) -> dict[str, str]:
    return {"path": str(TINY), "dtype": "float32", "device": str(device)}


def _write(folder: Path, work: Work, adapter: Path, port: int) -> Path:
    runs = len(work.seeds)
    settings = {
        "output_dir": str(folder),
        "model": _model(work.device),
        "lora": {"max_rank": 16},
        "trainer": {"slots": runs, "threads": work.trainer_threads, "init_adapter_path": str(adapter)},
        "inference": {"port": port, "threads": work.inference_threads, "max_adapters": 3 * runs},
    }
    path = folder / "serve.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def _write_run(folder: Path, work: Work, url: str) -> Path:
    settings = {
        "output_dir": str(folder),
        "model": _model(work.device),
        "inference_url": url,
        "max_steps": work.steps,
        "checkpoint_interval_steps": work.steps,
        "environment": {"name": "reverse_text", "options": OPTIONS},
        "sampling": {
            "prompts_per_step": work.prompts, "samples_per_prompt": work.samples, "max_tokens": work.max_tokens,
            "temperature": 1.0, "skip_equal_groups": work.skip_equal_groups,
        },
        "adapter": {"rank": 16, "alpha": 32},
        "optimizer": {"learning_rate": work.learning_rate, "warmup_steps": work.warmup_steps},
    }  # fmt: skip
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(settings))
    return path
