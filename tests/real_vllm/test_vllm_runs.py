"""Whole runs sampled by the real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PYTHON
from made_versions import BASE, MAX_LENGTH, MAX_RANK

from graftwork.store.files import read_lines
from graftwork.store.layout import RunTree

REPOSITORY = Path(__file__).parents[2]
STEPS = 5
RL = f"""
[model]
path = "{BASE}"
dtype = "float32"
device = "cpu"
[lora]
max_rank = {MAX_RANK}
[trainer]
threads = 1
[run]
id = "warm"
max_steps = {STEPS}
checkpoint_interval_steps = 1
request_timeout_seconds = 300
[run.environment]
options = {{ min_length = 4, max_length = 6 }}
[run.sampling]
prompts_per_step = 8
samples_per_prompt = 4
max_tokens = 10
[run.retention]
history = true
"""


def graftwork(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graftwork", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    places = ["--output_dir", str(folder), "--max-steps", "12", "--adapter.rank", "8", "--lora.max_rank", str(MAX_RANK)]
    done = graftwork("sft", "examples/reverse_text/sft.toml", *places)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "adapter"


def test_a_warm_started_run_is_sampled_by_a_server_that_runs_already(
    url: str, sft_adapter: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "rl.toml"
    settings.write_text(RL)
    places = ["--output_dir", str(tmp_path), "--run.init_adapter_path", str(sft_adapter)]
    done = graftwork("rl", str(settings), "--inference.base_url", url, *places)
    assert done.returncode == 0, done.stderr[-3000:]
    tree = RunTree.at(tmp_path / "run_warm")
    rows = read_lines(tree.metrics_jsonl)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["mismatch_mean"] for row in rows) <= 0.005
    assert max(row["mismatch_max"] for row in rows) <= 0.03
    for step in range(1, STEPS + 1):
        [version] = json.loads((tree.batch(step) / "batch.json").read_text())["versions"]
        assert version["digest_source"] == "claimed"
        assert version["probe"]["gap"] <= 0.03
        assert version["probe"]["base_gap"] > 0.06, "the warm start itself can be told from the base"
        if step == 1:
            assert version["probe"]["outcome"] == "verified"
    assert len({row["version"] for row in rows}) == STEPS
    assert not (tmp_path / "logs" / "inference.log").exists(), "it started none of its own"


def test_when_vllm_is_killed_the_run_ends_at_once_with_the_reason_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    """Our own vLLM: `--inference vllm`."""
    settings = tmp_path / "rl.toml"
    assert PYTHON is not None
    settings.write_text(RL.replace(f"max_steps = {STEPS}", "max_steps = 10000"))
    flags = ["--inference", "vllm", "--inference.vllm.python", PYTHON, "--inference.max_model_len", str(MAX_LENGTH)]
    flags += ["--inference.threads", "1", "--inference.max_sequences", "32", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "graftwork", "rl", str(settings), *flags]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run_warm" / "metrics.jsonl"
        deadline = time.monotonic() + 600
        while not metrics.exists() or len(read_lines(metrics)) < 2:
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        own = json.loads((tmp_path / "logs" / "inference.json").read_text())["pid"]
        family = [own, *descendants(own)]
        assert len(family) >= 3, "ours, vLLM's server, its engine"
        os.kill(own, signal.SIGKILL)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
    assert "the inference was killed by SIGKILL" in said and "--resume" in said
    wait_until_gone(family)


def descendants(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    children = [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    return [*children, *(deeper for child in children for deeper in descendants(child))]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.2)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
