"""What `make proof-main` shows at full size: kill -9 of everything, resume, the same bytes. Here 4 steps and two kills."""

from pathlib import Path

import pytest

from graftwork.store.layout import stable_steps
from proofs.killing import Kill
from proofs.main import Job, compare, consumed_wrongly

STEPS = 4
FLAGS = (
    *("--run.init_adapter_path", "null", "--run.checkpoint_interval_steps", "2"),
    *("--run.sampling.prompts_per_step", "16", "--run.sampling.samples_per_prompt", "4"),
)


def test_killed_while_training_and_while_saving_it_ends_with_the_bytes_of_the_run_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    whole = Job(tmp_path / "whole", STEPS, FLAGS).complete()
    job = Job(tmp_path / "killed", STEPS, FLAGS)
    hit = job.killed([Kill("training", 0, 0.0), Kill("checkpoint", 1, 0.0)])
    assert hit, "no kill struck"
    assert compare(job.tree, whole, STEPS) == [] and consumed_wrongly(job.tree, whole, STEPS) == []
    assert stable_steps(job.tree.checkpoints) == [0, 2, 4]
