"""Tests with the package verifiers itself: `make test-verifiers`. Where it is not installed, they are not collected."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "verifiers_multiturn"
BASE = REPOSITORY / "examples" / "reverse_text" / "base"

if importlib.util.find_spec("verifiers") is None:
    collect_ignore_glob = ["test_*.py"]
sys.path.append(
    str(EXAMPLE)
)  # verifiers looks its modules up by plain names: reverse_game, and odd_game beside this file


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of an embedded server that serves the example's base."""
    folder = tmp_path_factory.mktemp("server")
    ready, config = folder / "ready.json", folder / "inference.toml"
    model = {"path": str(BASE), "dtype": "float32", "device": "cpu"}
    config.write_text(
        tomli_w.dumps({"port": 0, "threads": 1, "max_model_len": 128, "ready_file": str(ready), "model": model})
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "graftwork", "inference", str(config)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield json.loads(ready.read_text())["url"]
    finally:
        process.terminate()
        process.wait(20)
