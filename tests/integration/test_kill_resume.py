"""What `make proof-main` shows at full size, here with 4 steps and two kills: kill -9, resume, the same bytes."""

from pathlib import Path

import pytest
from support import random_adapter

from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import load_base
from graftwork.store.disk import Disk
from graftwork.store.layout import stable_steps
from graftwork.store.queue import read_version
from proofs.killing import Kill
from proofs.main import EXAMPLE, Job, compare, consumed_wrongly

STEPS = 4
SMALL = ("--run.sampling.prompts_per_step", "16", "--run.sampling.samples_per_prompt", "4")


def wild_adapter(folder: Path) -> Path:
    """Random weights: answers of all kinds, so rewards differ and every step moves the weights."""
    base = load_base(ModelConfig(path=str(EXAMPLE / "base"), dtype="float32", device="cpu"), LoraConfig())
    adapter = random_adapter(base.spec.shapes, 16, scale=2.0, size=0.1)
    with Disk().publish_dir(folder, "adapter", {}) as staging:
        for name, data in write_peft(adapter, AdapterFacts()).items():
            staging.write(name, data)
    return folder


def test_killed_while_training_and_while_saving_it_ends_with_the_bytes_of_the_run_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    adapter = wild_adapter(tmp_path / "adapter")
    flags = ("--run.init_adapter_path", str(adapter), "--run.checkpoint_interval_steps", "2", *SMALL)
    whole = Job(tmp_path / "whole", STEPS, flags).complete()
    versions = [read_version(whole, step) for step in range(STEPS + 1)]
    assert len({version.version.digest for version in versions if version}) == STEPS + 1
    job = Job(tmp_path / "killed", STEPS, flags)
    hit = job.killed([Kill("training", 0, 0.0), Kill("checkpoint", 1, 0.0)])
    assert hit, "no kill struck"
    assert compare(job.tree, whole, STEPS) == [] and consumed_wrongly(job.tree, whole, STEPS) == []
    assert stable_steps(job.tree.checkpoints) == [0, 2, 4]
