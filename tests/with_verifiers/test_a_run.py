"""`graftwork rl` with verifiers environments: batches of branches are learnt, failures end a run, a resume goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from conftest import EXAMPLE, REPOSITORY

from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import read_batch

TOML = EXAMPLE / "rl.toml"
SMALL = [
    "--max-steps", "2", "--run.init_adapter_path", "null", "--run.checkpoint_interval_steps", "2",
    "--run.retention.history", "true", "--run.sampling.prompts_per_step", "3", "--run.sampling.samples_per_prompt", "2",
    "--run.evaluation.prompts", "2", "--run.loss.normaliser", "sequence_mean", "--inference.threads", "1",
    "--trainer.threads", "1",
]  # fmt: skip


def train(outputs: Path, *flags: str, kind: str | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(REPOSITORY), str(EXAMPLE), str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")]
    config = tomllib.loads(TOML.read_text())
    if kind:
        options = {"taskset": {"kind": kind}, "heldout_tasks": 2}
        config["run"]["environment"] = {"name": "verifiers:odd_game", "options": options}
    outputs.mkdir(exist_ok=True)
    (outputs / "rl.toml").write_text(tomli_w.dumps(config))
    command = [
        sys.executable,
        "-m",
        "graftwork",
        "rl",
        str(outputs / "rl.toml"),
        "--output_dir",
        str(outputs),
        *SMALL,
        *flags,
    ]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations_that_branch_are_learnt(tmp_path: Path) -> None:
    done = train(tmp_path, kind="branch")
    assert done.returncode == 0, done.stdout + done.stderr
    tree = RunTree(RunId("reverse-game"), tmp_path / "run_reverse-game")
    metrics = lines(tree.metrics_jsonl)
    assert [(row["step"], row["answers"], row["rollouts"]) for row in metrics] == [(1, 6, 12), (2, 6, 12)]
    assert all(row["mismatch_max"] < 1e-3 and not row["skipped"] for row in metrics)
    rows = lines(tree.samples_jsonl)
    assert {row["digest_source"] for row in rows} == {"engine"}
    for step, version in ((1, 0), (2, 1)):
        read = read_batch(tree, step)
        assert read is not None
        assert [v.name.partition("@")[2].partition("-")[0] for v in read[0].versions] == [str(version)]
        rewards = [row["reward"] for row in rows if row["step"] == step]
        assert abs(metrics[step - 1]["reward"] - sum(rewards) / 6) < 1e-6
    assert [row["step"] for row in lines(tree.evals_jsonl)] == [0, 2]


def test_too_many_failures_end_the_run_with_the_reason(tmp_path: Path) -> None:
    done = train(tmp_path, "--run.max_failed_share", "0.1", kind="fail")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "rollouts of batch 1 failed, more than max_failed_share = 0.1 allows" in said
    assert "the puzzle is missing" in said


def test_the_game_of_the_example_is_played_and_resumed(tmp_path: Path) -> None:
    assert train(tmp_path).returncode == 0
    done = train(tmp_path, "--resume", "--max-steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    tree = RunTree(RunId("reverse-game"), tmp_path / "run_reverse-game")
    assert [row["step"] for row in lines(tree.metrics_jsonl)] == [1, 2, 3]
    assert {row["step"] for row in lines(tree.samples_jsonl)} == {1, 2, 3}
    prompts = {row["prompt"] for row in lines(tree.samples_jsonl)}
    assert len(prompts) == 9, "every step has tasks of its own"
