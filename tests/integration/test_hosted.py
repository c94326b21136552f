"""One `graftwork serve` with real processes: submit, stop, resume, killed sampler and trainer, export, verify."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.store.chain import read_chain
from graftwork.store.files import read_json, read_lines
from graftwork.store.layout import OutputTree, RunId
from graftwork.store.status import read_status

COMMAND = [sys.executable, "-m", "graftwork"]
SMALL = ["--sampling.prompts_per_step", "4", "--sampling.samples_per_prompt", "4", "--init_adapter_path", "null"]


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[OutputTree]:
    """Served with one slot."""
    outputs = OutputTree(tmp_path / "outputs")
    flags = ["--output_dir", str(outputs.root), "--trainer.slots", "1", "--trainer.threads", "1"]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen([*COMMAND, "serve", "examples/many_runs/serve.toml", *flags], stdout=log, stderr=log)
    try:
        until(outputs.serve_json.exists)
        yield outputs
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM, (tmp_path / "serve.log").read_text()


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def graftwork(outputs: OutputTree, *arguments: str) -> str:
    command = [*COMMAND, *arguments, "--output-dir", str(outputs.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def step_of(outputs: OutputTree, name: str) -> int:
    status = read_status(outputs.run(RunId(name)))
    return -1 if status is None or status.step is None else status.step


def row(outputs: OutputTree, name: str) -> dict[str, Any]:
    return next(row for row in json.loads(graftwork(outputs, "runs", "--json"))["runs"] if row["id"] == name)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_runs_go_through_everything_that_can_happen_to_them(outputs: OutputTree, tmp_path: Path) -> None:
    endless = ["--max_steps", "1000000", "--retention.history", "true", *SMALL]
    graftwork(outputs, "submit", "examples/many_runs/run.toml", "--id", "a", "--id", "b", *endless)
    until(lambda: step_of(outputs, "a") >= 2)
    assert row(outputs, "a")["state"] == "active"
    assert row(outputs, "b")["state"] == "queued" and row(outputs, "b")["place"] == 1

    assert "stopped" in graftwork(outputs, "stop", "a")
    stopped_at = step_of(outputs, "a")
    assert row(outputs, "a")["state"] == "stopped"
    until(lambda: step_of(outputs, "b") >= 2)  # it got the slot

    kill(read_json(outputs.logs / "inference.json", "inference")["pid"])
    at = step_of(outputs, "b")
    until(lambda: step_of(outputs, "b") >= at + 2)  # its orchestrator loaded its version again
    kill(read_json(outputs.trainer_json, "trainer")["pid"])
    at = step_of(outputs, "b")
    until(lambda: step_of(outputs, "b") >= at + 2)  # the trainer was started again, and went on unasked
    graftwork(outputs, "stop", "b")

    end = stopped_at + 3
    graftwork(outputs, "resume", "a", "--max-steps", str(end))
    until(lambda: row(outputs, "a")["state"] == "finished")
    a, b = (outputs.run(RunId(name)) for name in "ab")
    assert [link.step for link in read_chain(a)] == list(range(end + 1))
    assert [row["step"] for row in read_lines(b.metrics_jsonl)] == list(range(1, step_of(outputs, "b") + 1))
    assert graftwork(outputs, "runs", "verify", "a", "b").count(": ok") == 2
    graftwork(outputs, "runs", "export", "a", "--step", str(end), "--out", str(tmp_path / "adapter"))
    assert read_peft(tmp_path / "adapter").adapter.digest() == read_chain(a)[-1].digest
