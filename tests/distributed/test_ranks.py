"""Several ranks are one trainer: gradients, checkpoints, memory, faults, and whole jobs with a rank that is killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.base_checks import CHECKED
from distributed.findings import FAULTS, Findings

from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import BaseModel, load_base
from graftwork.store.queue import read_version
from proofs.rank_jobs import Job, Strike
from proofs.sharded import END_SECONDS, GRADIENT_BAR, KINDS, MEMORY_BAR
from proofs.workload import save_adapter, trees_of


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_cut_base_is_the_base(findings: Findings, ranks: int) -> None:
    """Among its tensors are some of 61 and of 5 rows: parts of unequal size, and of none."""
    assert findings.on(ranks)["base"] == CHECKED


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_full_tensor_is_laid_out_over_ranks_each_writing_its_part(findings: Findings, ranks: int) -> None:
    found = findings.on(ranks)["fills"]
    assert found["wrong"] == [] and found["tried"] == 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_adapter_comes_into_its_slot_and_touches_no_other(findings: Findings, ranks: int, kind: str) -> None:
    assert findings.on(ranks)[f"slots of {kind}"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_rank(findings: Findings, ranks: int, kind: str) -> None:
    """Of runs with more sequences than ranks and with fewer, alone and mixed, the base sharded and replicated."""
    found = findings.on(ranks)[kind]
    assert found.keys() == {"sharded", "sharded, mixed", "replicated", "replicated, mixed"}
    assert 0 < max(found.values()) <= GRADIENT_BAR


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_4_ranks_is_taken_up_by_2_by_1_and_by_3_with_every_bit(findings: Findings, kind: str) -> None:
    findings.on(3)
    assert findings.chain.wrong(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_in_8_files_is_read_by_3_ranks(findings: Findings, kind: str) -> None:
    findings.on(3)
    assert findings.chain.converted_is_read(kind)


def test_a_rank_holds_what_the_formula_says(findings: Findings) -> None:
    for slots, row in findings.on(2)["memory"].items():
        assert abs(row["ratio"] - 1) <= MEMORY_BAR, (slots, row)


def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_fails_the_run_on_all_ranks(findings: Findings) -> None:
    faults = findings.on(2)["faults"]
    assert faults["failures"] == []
    assert faults["asked"] == len(FAULTS.split(",")) and min(faults["operations"]) >= 3


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, moe_path: Path) -> Callable[..., Job]:
    """A warm start, a run with a KL term and a mixed run, on two slots. settings: of the trainer."""
    folder = tmp_path_factory.mktemp("jobs")

    def make(name: str, ranks: int, base: Path = tiny_path, **settings: Any) -> Job:
        model = ModelConfig(path=str(base), dtype="float32", device="cpu")
        adapter = folder / f"adapter_{base.name}"
        if not adapter.exists():
            save_adapter(adapter, load_base(model, LoraConfig(max_rank=4)))
        return Job(folder / name, model, adapter, ranks, settings)

    return make


@pytest.fixture(scope="module")
def whole(job: Callable[..., Job]) -> Job:
    return job("whole", 2).run()


def test_runs_come_and_go_on_two_ranks_as_on_one(job: Callable[..., Job], whole: Job) -> None:
    """They start as the same adapters, bit by bit, and end near one another."""
    alone = job("alone", 1).run()
    assert whole.wrong() == alone.wrong() == []
    for ours, theirs in zip(trees_of(whole.outputs), trees_of(alone.outputs), strict=True):
        starts = [read_version(tree, 0) for tree in (ours, theirs)]
        assert starts[0] is not None and starts[1] is not None
        assert starts[0].version == starts[1].version
        last = min(ours.checkpoints.glob("step_[45]"), key=str).name
        files = sorted(path.name for path in (ours.checkpoints / last / "trainer").iterdir())
        assert files == ["rank_0.safetensors", "rank_1.safetensors", "state.json"]


def test_a_killed_rank_ends_the_job_which_says_who_and_goes_on_to_the_same_bytes(
    job: Callable[..., Job], whole: Job
) -> None:
    # A communication with the dead rank that hangs (seen once) is ended by the watch, before torchrun's
    # patience with this one is over, which is 30 s.
    struck = job("killed", 2, rank_timeout_seconds=20)
    strike = Strike(struck, rank=1, versions=7, number=signal.SIGKILL)
    struck.run(strike)
    assert struck.wrong() == [] and struck.outcomes() == whole.outcomes()
    assert strike.named() is not None, struck.tail
    assert strike.seconds <= END_SECONDS


def test_experts_on_four_ranks_with_the_base_replicated_and_layers_computed_twice(
    job: Callable[..., Job], moe_path: Path, moe: BaseModel
) -> None:
    made = job("moe", 4, moe_path, base_placement="replicated", activation_checkpointing=True).run()
    assert made.wrong() == []
    assert all(len(outcome.trainer) == 5 for outcome in made.outcomes().values())
