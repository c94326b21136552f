"""The main job on a mixture of experts, through the command line: SFT -> RL from it at another rank and alpha."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_story import REPOSITORY, graftwork

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.store.files import read_json, read_lines, verify
from graftwork.store.layout import RunTree, stable_steps
from graftwork.store.queue import read_version
from graftwork.store.status import read_status

SFT_TOML, RL_TOML = "examples/reverse_text_moe/sft.toml", "examples/reverse_text_moe/rl.toml"
BASE = str(REPOSITORY / "examples/reverse_text_moe/base")
STEPS, LAST = 10, 12


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds sft/adapter: rank 8, alpha 16, attention and 12 experts a layer."""
    folder = tmp_path_factory.mktemp("moe")
    graftwork("sft", SFT_TOML, "--output_dir", str(folder / "sft"))
    return folder


@pytest.fixture(scope="module")
def run(outputs: Path) -> RunTree:
    """RL from it at rank 16, alpha 24, to step 10, then resumed."""
    flags = [RL_TOML, "--output_dir", str(outputs), "--run.init_adapter_path", str(outputs / "sft" / "adapter")]
    flags += ["--run.retention.history", "true"]
    graftwork("rl", *flags, "--max-steps", str(STEPS))
    graftwork("rl", *flags, "--resume", "--max-steps", str(LAST))
    return RunTree.at(outputs / "run_experts")


def test_the_reward_rises_on_experts_through_a_checkpoint_and_a_resume(run: RunTree) -> None:
    rows = read_lines(run.metrics_jsonl)
    assert [row["step"] for row in rows] == list(range(1, LAST + 1))
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-2:]) - rewards[0] >= 0.1
    assert max(row["mismatch_max"] for row in rows) < 1e-4
    status = read_status(run)
    assert status is not None and (status.state, status.start_step) == ("finished", STEPS)
    for step in stable_steps(run.checkpoints):
        verify(run.checkpoint(step), "checkpoint")


def test_the_run_starts_as_the_function_of_an_adapter_of_another_rank_and_alpha(run: RunTree, outputs: Path) -> None:
    source = outputs / "sft" / "adapter"
    report = read_json(run.checkpoint(0) / "report.json", "report")
    assert (report["rank"], report["alpha"], report["source_ranks"]) == (16, 24.0, [8])
    assert report["done"] == {"padded": 28, "rescaled": 28} and report["exact"]
    said = (outputs / "logs" / "orchestrator.log").read_text()
    assert "28 modules padded" in said and "the same function as the source's" in said
    diff = graftwork("adapter", "diff", str(source), str(run.checkpoint(0)), "--base", BASE, "--json")
    assert json.loads(diff.splitlines()[0])["relative_difference"] < 1e-5


def test_every_version_is_the_adapter_that_it_says(run: RunTree) -> None:
    for step in range(LAST + 1):
        published = read_version(run, step)
        assert published is not None
        adapter = read_peft(published.path).adapter
        assert adapter.digest() == published.version.digest
        assert len(adapter.pairs) == 28 and {pair.rank for pair in adapter.pairs.values()} == {16}
