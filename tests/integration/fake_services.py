"""Small stand-ins for what `graftwork serve` and `submit` start: `fake_services.py PROGRAM PATH`.

FAKE_<PROGRAM> in the environment says how a fake misbehaves. They live until they are told to end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import tomllib
from pathlib import Path

from graftwork.programs.processes import end_with_parent
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunTree

FREE_PORT = 54321
"""What the fake inference says it found when it was asked for any free port; it does not listen."""
LIFE_SECONDS = 300.0


def inference(file: Path) -> None:
    settings = tomllib.loads(file.read_text())
    if mood("inference") == "port taken":
        sys.exit("error: cannot listen on 127.0.0.1:8000: the port is taken")
    url = f"http://127.0.0.1:{settings['port'] or FREE_PORT}"
    Disk().publish_json(Path(settings["ready_file"]), {"url": url, "pid": os.getpid()})
    if mood("inference") == "dies":
        serve_json = Path(settings["ready_file"]).parent.parent / "serve.json"
        while not serve_json.exists():  # until it was seen to be up
            time.sleep(0.05)
        sys.exit("error: the engine broke")


def trainer(file: Path) -> None:
    settings = tomllib.loads(file.read_text())
    assert settings["exit_when_done"] is False
    outputs = OutputTree(Path(settings["output_dir"]))
    Disk().claim(outputs.trainer_lock, "a trainer")  # held by this process, whatever becomes of the object
    Disk().publish_json(outputs.trainer_json, {"pid": os.getpid(), "slots": settings["slots"]})


def orchestrator(run_dir: Path) -> None:
    if mood("orchestrator") == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tree = RunTree.at(run_dir)
    Disk().claim(tree.orchestrator_lock, f"the orchestrator of run {tree.id}")


def mood(program: str) -> str:
    return os.environ.get(f"FAKE_{program.upper()}", "")


if __name__ == "__main__":
    end_with_parent()
    {"inference": inference, "trainer": trainer, "orchestrator": orchestrator}[sys.argv[1]](Path(sys.argv[2]))
    time.sleep(LIFE_SECONDS)
