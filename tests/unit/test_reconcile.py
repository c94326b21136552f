"""reconcile is pure: worlds in, actions out."""

from pathlib import Path
from typing import Any

import pytest

from graftwork.config.load import dump
from graftwork.config.run import RunConfig
from graftwork.config.section import ModelConfig
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import Status, read_status, write_status
from graftwork.training.observe import Observer
from graftwork.training.runs import (
    Admit,
    End,
    Enqueue,
    FromCheckpoint,
    FromTrainer,
    Memory,
    Release,
    Seat,
    SeenRun,
    World,
    reconcile,
)

MODEL = ModelConfig(path="base")


def seen(
    name: str, digest: str | None = "d", status: Status | None = None, steps: tuple[int, ...] = (), **settings: Any
) -> SeenRun:
    config = None if digest is None else RunConfig(model=MODEL, **settings)
    return SeenRun(RunTree.at(Path(f"/x/run_{name}")), digest, config, None, steps, status)


def world(*runs: SeenRun) -> World:
    return World({run.tree.id: run for run in runs})


def status(name: str, state: Any, arrival: int, digest: str = "d", admitted: bool = False) -> Status:
    return Status(name, state, digest, arrival, admitted=admitted)


A, B, C = RunId("a"), RunId("b"), RunId("c")


def test_newcomers_get_the_lowest_free_slots_and_the_rest_waits_in_line() -> None:
    actions = reconcile(world(seen("a"), seen("b"), seen("c")), Memory(2))
    assert actions == [
        Admit(A, 1, 0, FromTrainer()),
        Admit(B, 2, 1, FromTrainer()),
        Enqueue(C, 3, "no slot is free", 1),
    ]


def test_first_come_first_served_across_restarts() -> None:
    runs = world(seen("a"), seen("b", status=status("b", "queued", 2)), seen("c", status=status("c", "queued", 1)))
    actions = reconcile(runs, Memory(1))
    assert [(type(x).__name__, str(x.run)) for x in actions] == [("Admit", "c"), ("Enqueue", "b"), ("Enqueue", "a")]


def test_a_run_that_held_a_slot_before_a_restart_comes_before_those_that_waited() -> None:
    runs = world(
        seen("a", status=status("a", "queued", 1)),
        seen("b", status=status("b", "active", 2, admitted=True), steps=(0, 10)),
    )
    assert reconcile(runs, Memory(1))[0] == Admit(B, 2, 0, FromCheckpoint(None))


def test_a_folder_that_vanished_frees_its_slot_and_the_next_pass_gives_it_away() -> None:
    seats = {A: Seat(0, "d", 1)}
    runs = world(seen("b", status=status("b", "queued", 2)))
    assert reconcile(runs, Memory(1, seats)) == [Release(A, "removed"), Enqueue(B, 2, "no slot is free", 1)]
    assert reconcile(runs, Memory(1)) == [Admit(B, 2, 0, FromTrainer())]


def test_an_unreadable_config_means_wait() -> None:
    assert reconcile(world(seen("a", digest=None)), Memory(1)) == []
    assert reconcile(world(seen("a", digest=None)), Memory(1, {A: Seat(0, "d", 1)})) == []


def test_a_wrong_config_fails_the_run_with_its_message() -> None:
    wrong = SeenRun(RunTree.at(Path("/x/run_a")), "d", None, "orch.toml: run.seeds: no such key", (), None)
    assert reconcile(world(wrong), Memory(1)) == [End(A, 1, "failed", "orch.toml: run.seeds: no such key")]


@pytest.mark.parametrize("state", ["finished", "failed", "evicted", "stopped"])
def test_what_ended_stays_ended_until_its_config_changes(state: str) -> None:
    assert reconcile(world(seen("a", status=status("a", state, 1), steps=(0, 20))), Memory(1)) == []
    again = seen("a", digest="new", status=status("a", state, 1), steps=(0, 20), resume=True)
    assert reconcile(world(again), Memory(1)) == [Admit(A, 2, 0, FromCheckpoint(None))]


def test_a_changed_config_ends_the_admission() -> None:
    assert reconcile(world(seen("a", digest="new")), Memory(1, {A: Seat(0, "d", 1)})) == [Release(A, "reconfigured")]


def test_resume_without_a_checkpoint_never_starts_over() -> None:
    (action,) = reconcile(world(seen("a", resume=True)), Memory(1))
    assert (
        isinstance(action, End)
        and action.reason is not None
        and "asked to resume" in action.reason
        and "nothing was started" in action.reason
    )


def test_resume_takes_the_step_that_is_named() -> None:
    (action,) = reconcile(world(seen("a", steps=(0, 10, 20), resume=True, resume_step=10)), Memory(1))
    assert action == Admit(A, 1, 0, FromCheckpoint(10))


def test_a_restarted_trainer_goes_on_from_the_newest_checkpoint_not_from_the_named_one() -> None:
    run = seen("a", steps=(0, 10, 20), status=status("a", "active", 1, admitted=True), resume=True, resume_step=10)
    assert reconcile(world(run), Memory(1)) == [Admit(A, 1, 0, FromCheckpoint(None))]


def test_checkpoints_beyond_step_0_are_not_taken_up_unasked() -> None:
    (action,) = reconcile(world(seen("a", steps=(0, 10))), Memory(1))
    assert (
        isinstance(action, End)
        and action.reason is not None
        and "checkpoints up to step 10 and did not ask to resume" in action.reason
    )


def test_a_copied_folder_must_ask() -> None:
    copied = seen("b", steps=(0, 10), status=status("a", "active", 1, admitted=True))
    assert isinstance(reconcile(world(copied), Memory(1))[0], End)


def test_a_warm_start_waits_for_its_step_0_and_never_falls_through_to_a_fresh_adapter() -> None:
    (action,) = reconcile(world(seen("a", init_adapter_path="/adapter")), Memory(1))
    assert isinstance(action, Enqueue) and "waiting for its step_0" in action.reason
    assert reconcile(world(seen("a", steps=(0,), init_adapter_path="/adapter")), Memory(1)) == [
        Admit(A, 1, 0, FromCheckpoint(None))
    ]


def test_observe_reads_what_the_folders_say(tmp_path: Path) -> None:
    tree = OutputTree(tmp_path).run(A)
    Disk().publish_file(tree.orch_toml, dump(RunConfig(model=MODEL, seed=3)))
    write_status(Disk(), tree, status("a", "queued", 4))
    (tmp_path / "run_half" / "control").mkdir(parents=True)
    (tmp_path / "run_half" / "control" / "orch.toml").write_text("seed = ")
    found = Observer(OutputTree(tmp_path)).look({}).runs
    assert found[A].config is not None and found[A].config.seed == 3 and found[A].status == read_status(tree)
    assert found[RunId("half")].orch_digest is None
