"""Small stand-ins for `graftwork inference|trainer|orchestrator`, run as a script: `fake_programs.py trainer FILE`.

FAKE_<PROGRAM> in the environment says how a fake misbehaves. Their run is always called x.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from graftwork.programs.processes import end_with_parent
from graftwork.store.disk import Disk
from graftwork.store.files import read_json
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import Status, read_status, write_status

WAIT_SECONDS = 30.0


def fake_inference(file: Path) -> None:
    if mood("inference") == "port taken":
        sys.exit("error: cannot listen on 127.0.0.1:8000: the port is taken; choose another inference.port")
    settings = read_toml(file)
    Disk().publish_json(Path(settings["ready_file"]), {"url": "http://127.0.0.1:1", "pid": os.getpid()})
    if mood("inference") == "dies":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def fake_trainer(file: Path) -> None:
    disk, outputs = Disk(), OutputTree(Path(read_toml(file)["output_dir"]))
    disk.publish_json(outputs.trainer_json, {"pid": os.getpid()})
    tree = outputs.run(RunId("x"))
    orch = wait_for_new_orch_toml(tree)
    settings = read_toml(tree.orch_toml)

    def say(state: Any, step: int, reason: str | None = None) -> None:
        write_status(disk, tree, Status("x", state, orch, 1, step=step, start_step=first, reason=reason))

    first = 2 if settings["resume"] else 0
    disk.cut_log(tree.metrics_jsonl, first)
    for step in range(first + 1, settings["max_steps"] + 1):
        say("active", step - 1)
        if mood("trainer") == "dies" and step == 2:
            raise ValueError("a bug of ours")
        if mood("trainer") == "fails the run" and step == 2:
            say("failed", step - 1, "batch 2 is damaged")
            return
        time.sleep(0.2)
        row = {"step": step, "reward": 0.3 + 0.1 * step, "reward_std": 0.2, "loss": None, "tokens_per_second": 1234.5}
        disk.append_line(tree.metrics_jsonl, json.dumps(row))
    if not tree.checkpoint(settings["max_steps"]).exists():
        publish_checkpoint(tree, settings["max_steps"])
    say("finished", settings["max_steps"])


def fake_orchestrator(run_dir: Path) -> None:
    tree = RunTree.at(run_dir)
    orch = digest_of(tree.orch_toml)
    if mood("orchestrator") == "leaves":
        time.sleep(1.0)
        return
    if mood("orchestrator") == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    while True:
        status = read_json(tree.status_json, "status") if tree.status_json.exists() else {}
        if status.get("orch_digest") == orch and status["state"] == "finished":
            return
        if status.get("orch_digest") == orch and status["state"] == "failed":
            sys.exit(f"error: run x failed: {status['reason']}")
        time.sleep(0.05)


def mood(program: str) -> str:
    return os.environ.get(f"FAKE_{program.upper()}", "")


def read_toml(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text())


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def wait_for_new_orch_toml(tree: RunTree) -> str:
    """The digest of an orch.toml that no status speaks of yet."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if tree.orch_toml.exists():
            status, orch = read_status(tree), digest_of(tree.orch_toml)
            if status is None or status.orch_digest != orch:
                return orch
        time.sleep(0.02)
    sys.exit("error: no new orch.toml appeared")


def publish_checkpoint(tree: RunTree, step: int) -> None:
    with Disk().publish_dir(tree.checkpoint(step), "checkpoint", {"step": step}) as staging:
        staging.write_json("weight/adapter_config.json", {"r": 4})


if __name__ == "__main__":
    end_with_parent()
    programs = {"inference": fake_inference, "trainer": fake_trainer, "orchestrator": fake_orchestrator}
    programs[sys.argv[1]](Path(sys.argv[2]))
