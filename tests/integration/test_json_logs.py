"""JSON logs of the real programs: every line of every one parses, and steps carry their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/reverse_text"
SMALL = ("--run.sampling.prompts_per_step", "4", "--run.sampling.samples_per_prompt", "2")


def graftwork(*arguments: str) -> str:
    """The command's stderr."""
    command = [sys.executable, "-m", "graftwork", *arguments, "--log-format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert found and all({"time", "level", "program", "logger", "message"} <= one.keys() for one in found)
    return found


def steps(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if "step" in one]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_then_rl(tmp_path: Path) -> None:
    said = objects(graftwork("sft", f"{EXAMPLE}/sft.toml", "--output_dir", str(tmp_path / "sft"), "--max-steps", "2"))
    assert {one["program"] for one in said} == {"sft"}
    assert [one["loss"] for one in steps(said)] == [row["loss"] for row in rows(tmp_path / "sft" / "metrics.jsonl")]

    flags = ("--output_dir", str(tmp_path), "--run.init_adapter_path", str(tmp_path / "sft" / "adapter"), *SMALL)
    said = objects(graftwork("rl", f"{EXAMPLE}/rl.toml", "--max-steps", "2", *flags))
    (tree,) = tmp_path.glob("run_*")
    expected = [(row["step"], row["reward"], row["version"]) for row in rows(tree / "metrics.jsonl")]
    assert [(one["step"], one["reward"], one["version"]) for one in steps(said)] == expected
    logs = {path.stem: objects(path.read_text()) for path in (tmp_path / "logs").glob("*.log")}
    assert logs.keys() == {"inference", "trainer", "orchestrator"}
    for name, found in logs.items():
        assert [one["program"] for one in found] == ["rl", *[name] * (len(found) - 1)]  # the head is its starter's
    assert [(one["step"], one["reward"], one["version"]) for one in steps(logs["trainer"])] == expected
