"""A sample of what the proof of faults does with every operation: the trainer's storage fails, or it is killed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from graftwork.store.disk import Disk
from proofs.faults import (
    IO_ERROR,
    KILLED_AFTER,
    KILLED_AMID,
    KINDS,
    Fault,
    Figures,
    Killed,
    Operation,
    Twin,
    operations_of,
    real_kills,
    sweep,
    sweep_restarts,
    try_faults,
)
from proofs.workload import RUNS, Workload

COMPOSED = {
    "publish_file",
    "publish_json",
    "publish_dir",
    "stage",
    "append_line",
    "cut_log",
    "quarantine",
    "retire",
    "sweep",
}
"""Methods of Disk that reach the file system through others, but for two: what is tidied up after an error, and single
files that `sweep` removes; a trainer leaves none where it sweeps."""
NUMBERED = {name for name in vars(Twin) if name in vars(Disk) and not name.startswith("_")}


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory, tiny: BaseModel, tiny_model_config: ModelConfig) -> Workload:
    return Workload.record(tmp_path_factory.mktemp("workload"), tiny, tiny_model_config)


@pytest.fixture(scope="module")
def operations(workload: Workload) -> list[Operation]:
    return operations_of(workload)


def all_well(figures: Figures) -> bool:
    return not figures.failures and figures.done == figures.asked and figures.asked.total() > 0


def test_the_twin_numbers_everything_that_a_disk_does() -> None:
    assert {name for name in vars(Disk) if not name.startswith("_")} == COMPOSED | NUMBERED


def test_the_workload_does_the_same_operations_each_time(workload: Workload, operations: list[Operation]) -> None:
    assert operations_of(workload) == operations
    assert {operation.run for operation in operations} == {None, *RUNS}
    assert {operation.primitive for operation in operations} == NUMBERED


def test_after_a_failed_operation_and_after_a_kill_every_run_ends_with_the_bytes_of_the_unbroken_one(
    workload: Workload,
) -> None:
    figures = sweep(KINDS, 18, 0, workload)
    assert figures.failures == [] and all_well(figures)


def test_so_does_one_whose_trainer_is_broken_while_it_starts_after_a_kill(workload: Workload) -> None:
    figures = sweep_restarts(KINDS, 7, 0, workload)
    assert figures.failures == [] and all_well(figures)


def test_a_real_kill(workload: Workload) -> None:
    figures = real_kills(1, 0, workload)
    assert figures.failures == [] and all_well(figures)


# --- the other side: what a fault does, and that it is seen -----------------------------------------------------------


def first(operations: list[Operation], primitive: str, path: str) -> int:
    return next(one.number for one in operations if (one.primitive, one.path) == (primitive, path))


def test_a_version_of_other_bytes_is_seen(workload: Workload, operations: list[Operation]) -> None:
    """What one run comes to is held against another's."""
    expected = {**workload.expected, "kl": workload.expected["warm"]}
    other = Workload(workload.base, workload.model, workload.ready, expected)
    trial = try_faults(other, [Fault(KILLED_AFTER, first(operations, "rename", "run_kl/broadcasts/step_2"))])
    assert any(text.startswith("run kl: version 0 differs") for text in trial.wrong)


def test_a_kill_leaves_what_was_being_written_and_nobody_tidies_up(tmp_path: Path, workload: Workload) -> None:
    outputs = workload.lay(tmp_path / "outputs")
    twin = Twin(outputs, Fault(KILLED_AMID, 4))
    trainer = workload.trainer(outputs, twin)
    with pytest.raises(Killed):
        trainer.open()
    with pytest.raises(Killed):
        twin.publish_file(outputs.root / "more", b"never written")
    assert not outputs.root.exists()
    twin.bury()
    (left,) = outputs.root.glob(".staging-*")
    assert twin.struck == Operation(4, "write", ".staging-trainer.json-*") and 0 < left.stat().st_size < 2000
    assert not outputs.trainer_json.exists()
    workload.trainer(outputs, Disk()).open().release()


def test_an_error_ends_the_run_and_its_cleaning_up_is_done(tmp_path: Path, workload: Workload) -> None:
    outputs = workload.lay(tmp_path / "outputs")
    twin = Twin(outputs, Fault(IO_ERROR, 4))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        workload.trainer(outputs, twin).open()
    assert [path.name for path in outputs.root.iterdir() if not path.is_dir()] == [".trainer.lock"]
    twin.bury()
