"""`graftwork runs`: what is shown of a tree, from made-up looks at it and from made-up files."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftwork.config.load import digest
from graftwork.errors import BadRunId, ConfigError
from graftwork.programs import runs
from graftwork.programs.glance import Glance, Liveness, Removed, Seated, Seen, last_row, look, look_at, read_liveness
from graftwork.programs.news import News, changes
from graftwork.programs.runs import RunRow, adapter_of, age, headline, lines, rows, run_of, verify_lines
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import State, Status, write_status

NOW = 1_000_000.0
ORCH = "a" * 64


# --- what the tests share ---------------------------------------------------------------------------------------------


def status(run: str, state: State, **about: Any) -> Status:
    return Status(run, state, about.pop("orch", ORCH), 1, **about)


def seen(run: str, state: State | None = None, **about: Any) -> Seen:
    """A run whose orch.toml is there; about: fields of the status."""
    return Seen(run, orch_digest=ORCH, max_steps=20, status=status(run, state, **about) if state else None)


def glance(*seen_runs: Seen, liveness: Liveness | None = None) -> Glance:
    return Glance(seen_runs, liveness, 8, ())


def live(runs: dict[str, Seated] | None = None, *removed: Removed, seconds_ago: float = 1) -> Liveness:
    return Liveness(NOW - seconds_ago, 77, runs or {}, removed)


def one(run: Seen, liveness: Liveness | None = None) -> RunRow:
    return rows(glance(run, liveness=liveness), NOW)[0]


@pytest.fixture
def outputs(tmp_path: Path) -> OutputTree:
    return OutputTree(tmp_path / "outputs")


def tree_of(outputs: OutputTree, name: str, orch_toml: str = "max_steps = 30\n") -> RunTree:
    tree = outputs.run(RunId(name))
    Disk().publish_file(tree.orch_toml, orch_toml.encode())
    return tree


def publish(folder: Path, kind: str, *files: str) -> None:
    with Disk().publish_dir(folder, kind, {}) as staging:
        for name in files:
            staging.write(name, b"{}")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_order_is_slots_then_the_line_then_who_ended_then_who_was_removed() -> None:
    found = rows(
        glance(
            seen("ended", "finished", step=20),
            seen("second", "queued", place=2),
            seen("a-new"),
            seen("slot-ten", "active", slot=10),
            seen("first", "queued", place=1),
            seen("slot-two", "active", slot=2),
            seen("back", "stopped"),
            liveness=live(None, Removed("gone", 7, 1.0), Removed("back", 3, 2.0)),
        ),
        NOW,
    )
    assert [row.id for row in found] == [
        "slot-two", "slot-ten", "first", "second", "a-new", "back", "ended", "gone",
    ]  # fmt: skip
    assert found[-1] == RunRow("gone", "removed", step=7, reason="its folder is gone")


def test_an_active_run_has_what_the_trainer_says_of_it() -> None:
    run = Seen(
        "x", ORCH, max_steps=20, status=status("x", "active", slot=1, step=4),
        metrics={"step": 4, "reward": 0.25, "tokens_per_second": 1234.5},
    )  # fmt: skip
    row = one(run, live({"x": Seated(1, 4, 0.375, NOW - 90)}))
    assert row == RunRow("x", "active", 1, 4, 20, 0.25, 1234.5, 0.375, 90.0, None, None)
    assert runs.cells(row) == ["x", "active", "1", "4/20", "0.250", "1,234", "38%", "1m", ""]


def test_a_trainer_that_is_gone_says_nothing_of_shares() -> None:
    row = one(seen("x", "active", slot=1, step=4), live({"x": Seated(1, 4, 0.375, NOW - 90)}, seconds_ago=16))
    assert (row.state, row.share, row.last_batch_age_seconds) == ("active", None, None)
    assert row.reason == "interrupted, as no trainer is running"


@pytest.mark.parametrize(
    ("run", "state", "reason"),
    [
        (Seen("x", orch_error="it has no control/orch.toml"), "waiting", "it has no control/orch.toml"),
        (Seen("x", ORCH), "waiting", "no trainer has seen it yet"),
        (Seen("x", ORCH, copy_of="y"), "waiting", "a copy of run y"),
        (Seen("x", ORCH, status_error="status.json is not a status"), "unknown", "status.json is not a status"),
        (seen("x", "failed", step=3, reason="batch 4 is damaged"), "failed", "batch 4 is damaged"),
        (seen("x", "stopped", orch="b" * 64), "waiting", "changed since it was stopped"),
        (seen("x", "active", orch="b" * 64, slot=0), "active", "the trainer has not acted on that yet"),
        (Seen("x", orch_error="cannot be read", status=status("x", "evicted")), "evicted", "cannot be read"),
    ],
)
def test_states_and_reasons(run: Seen, state: str, reason: str) -> None:
    row = one(run, live())
    assert row.state == state
    assert reason in str(row.reason)


def test_a_run_that_nobody_samples_for_says_so_unless_it_has_ended() -> None:
    gone = "no orchestrator of it runs on this machine"
    states = {
        state: one(Seen("x", ORCH, status=status("x", state, reason="why"), orchestrator_error=gone), live()).reason
        for state in ("active", "queued", "finished")
    }
    assert states == {"active": f"why; {gone}", "queued": f"why; {gone}", "finished": "why"}


def test_numbers_that_are_none_are_shown_as_none() -> None:
    run = Seen("x", ORCH, status=status("x", "active"), metrics={"reward": None, "tokens_per_second": "many"})
    assert runs.cells(one(run))[4:6] == ["-", "-"]


@pytest.mark.parametrize(
    ("liveness", "words"),
    [
        (None, "no trainer is running"),
        (live(seconds_ago=120), "no trainer is running (the last sign of one is 2m old)"),
        (replace(live(), ended=True), "no trainer is running (the last sign of one is 1s old)"),
        (live({"x": Seated(), "y": Seated()}), "the trainer runs (pid 77); 2 of 8 slots used"),
    ],
)
def test_the_first_line_says_whether_a_trainer_lives(liveness: Liveness | None, words: str) -> None:
    assert headline(glance(liveness=liveness), NOW) == words
    assert lines(glance(liveness=liveness), NOW) == [words, "no runs"]


def test_ages() -> None:
    assert [age(seconds) for seconds in (-3, 0, 59.4, 60, 7199, 7200, 200_000)] == [
        "0s", "0s", "59s", "1m", "1h", "2h", "2d",
    ]  # fmt: skip


# --- how it is shown --------------------------------------------------------------------------------------------------


LONG = "[/bold] a reason " + "that goes on and on " * 20 + "\nto its end"


def test_a_reason_is_one_line_and_whole_in_columns_and_in_json() -> None:
    found = glance(seen("x", "failed", reason=LONG), liveness=live())
    row = lines(found, NOW)[2]
    assert row.startswith("x   failed  -     -/20") and row.endswith("on and on to its end")
    about = json.loads(json.dumps(runs.as_object(found, NOW)))
    assert about["runs"][0]["reason"] == LONG
    assert about["trainer"] == {"alive": True, "pid": 77, "seconds_since_sign": 1.0, "slots": 8, "slots_used": 0}


@pytest.mark.parametrize("cut", [True, False])
def test_a_terminal_gets_a_table(cut: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(runs.drawn(glance(seen("x", "failed", reason=LONG), liveness=live()), NOW, cut=cut))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/bold]" in shown
    assert (len(shown.splitlines()) == 3) == cut


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_look_at_real_files(outputs: OutputTree) -> None:
    disk, tree = Disk(), tree_of(outputs, "alpha")
    write_status(disk, tree, status("alpha", "active", orch=digest(tree.orch_toml.read_bytes()), slot=0, step=2))
    disk.append_line(tree.metrics_jsonl, '{"step": 2, "reward": 0.5, "tokens_per_second": 10}')
    disk.append(tree.metrics_jsonl, b'{"step": 3, "rew')
    disk.publish_json(outputs.trainer_json, {"slots": 4})
    runs_there = {"alpha": {"slot": 0, "step": 2, "tokens": 9, "share": 1.0, "last_batch_time": None}}
    disk.publish_json(outputs.liveness_json, {"pid": 7, "time": NOW, "passes": 1, "runs": runs_there, "removed": []})
    (outputs.root / "run_Not.An.Id").mkdir()
    found = look(outputs)
    row = rows(found, NOW)[0]
    assert (row.state, row.step, row.max_steps, row.reward, row.share) == ("active", 2, 30, 0.5, 1.0)
    assert headline(found, NOW) == "the trainer runs (pid 7); 1 of 4 slots used"
    assert "run_Not.An.Id" in lines(found, NOW)[-1]


def test_files_that_are_torn_or_not_there(outputs: OutputTree) -> None:
    tree = tree_of(outputs, "x", "this is = = no TOML")
    assert "cannot be read" in str(look_at(tree).orch_error)
    tree.status_json.write_bytes(b"{")
    assert look_at(tree).status_error is not None
    outputs.liveness_json.write_bytes(b'{"time": "never"}')
    assert read_liveness(outputs) is None
    outputs.trainer_json.write_bytes(b"[]")
    assert look(outputs).slots is None
    assert look_at(outputs.run(RunId("never-was"))).orch_error == "it has no control/orch.toml"


def test_a_copied_folder_brings_a_status_that_is_not_its_own(outputs: OutputTree) -> None:
    tree = tree_of(outputs, "copy")
    write_status(Disk(), tree, status("original", "finished", step=20))
    found = look_at(tree)
    assert (found.status, found.copy_of) == (None, "original")


def test_the_last_line_is_read_from_the_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10_000)) + "[1]\nno json\n")
    monkeypatch.setattr("graftwork.programs.glance.TAIL_BYTES", 100)
    assert last_row(path) == {"step": 9999}
    path.write_text('{"step": 1}')
    assert last_row(path) == {}


def test_who_holds_the_lock_is_only_a_hint(outputs: OutputTree) -> None:
    tree = tree_of(outputs, "x")
    assert look_at(tree).orchestrator_error == "no orchestrator of it runs on this machine"
    for holder, lives in (("x", True), ("another", False)):
        tree.orchestrator_lock.write_text(f"the orchestrator of run {holder}, pid {os.getpid()}\n")
        assert (look_at(tree).orchestrator_error is None) == lives
    Disk().make_folder(tree.logs)
    log = "=== start ===\nerror: the first one\n=== start ===\nINFO\nerror: no such environment\n"
    (tree.logs / "orchestrator.log").write_text(log)
    assert str(look_at(tree).orchestrator_error).endswith("its log ends: no such environment")


def test_main_prints_once(outputs: OutputTree, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no folder at"):
        runs.main(str(outputs.root), watch=False, as_json=False)
    tree_of(outputs, "x")
    runs.main(str(outputs.root), watch=False, as_json=False)
    assert capsys.readouterr().out.splitlines()[2].startswith("x   waiting  -     -/30")
    runs.main(str(outputs.root), watch=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "waiting"


def test_watch_ends_well_with_ctrl_c(
    outputs: OutputTree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree_of(outputs, "x")
    left = [None, None]

    def sleep(_: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()

    monkeypatch.setattr(time, "sleep", sleep)
    runs.main(str(outputs.root), watch=True, as_json=True)
    assert len(capsys.readouterr().out.splitlines()) == 3


# --- one run ----------------------------------------------------------------------------------------------------------


def test_which_adapter_is_exported(outputs: OutputTree) -> None:
    tree = tree_of(outputs, "x")
    with pytest.raises(ConfigError, match="no adapter is there yet"):
        adapter_of(tree, None)
    for step in (9, 10, 11):
        publish(tree.broadcast(step), "broadcast", "adapter_config.json")
    publish(tree.checkpoint(10), "checkpoint", "weight/adapter_config.json")
    publish(tree.checkpoint(5), "checkpoint", "weight/adapter_config.json")
    assert adapter_of(tree, None) == (11, tree.broadcast(11))
    assert adapter_of(tree, 10) == (10, tree.checkpoint(10) / "weight")
    assert adapter_of(tree, 9) == (9, tree.broadcast(9))
    with pytest.raises(ConfigError, match=r"no adapter of step 7 .*there are steps 5, 9, 10, 11"):
        adapter_of(tree, 7)


def test_a_run_that_is_not_there_is_named_with_those_that_are(outputs: OutputTree) -> None:
    tree_of(outputs, "alpha")
    tree_of(outputs, "beta")
    assert run_of(str(outputs.root), "beta").id == RunId("beta")
    with pytest.raises(ConfigError, match=r"no run gamma in .*; there are: alpha, beta"):
        run_of(str(outputs.root), "gamma")
    with pytest.raises(BadRunId):
        run_of(str(outputs.root), "No.Id")


def test_lines_of_a_verification() -> None:
    fine = {"run": "a", "findings": [], "checked": {"links": 20, "batches": 12, "unknown_versions": 0}}
    bad = {"run": "b", "findings": ["step_3: no", "step_4: no"], "checked": {"links": 1}}
    assert verify_lines([fine, bad]) == ["a: ok, 20 links, 12 batches", "b: step_3: no", "b: step_4: no"]
    assert verify_lines([{"run": "c", "findings": [], "checked": {}}]) == ["c: ok, nothing to check"]


# --- news -------------------------------------------------------------------------------------------------------------


def test_a_line_a_change_of_state() -> None:
    before = {
        "a": status("a", "queued", place=2),
        "b": status("b", "active", slot=0, step=1),
        "c": status("c", "failed"),
    }
    after = {
        "a": status("a", "queued", place=1), "b": status("b", "finished", step=20),
        "c": status("c", "failed", orch="b" * 64, step=3, reason="again"), "d": status("d", "queued", place=2),
    }  # fmt: skip
    assert changes(before, after, {Removed("e", 4, 9.0)}) == [
        "run b: finished at step 20",
        "run c: failed at step 3: again",
        "run d: queued at place 2",
        "run e: removed at step 4; its folder is gone, its slot is free",
    ]


def test_news_are_what_changed_since_the_last_look(outputs: OutputTree) -> None:
    disk, tree = Disk(), tree_of(outputs, "x")
    write_status(disk, tree, status("x", "active", slot=0, step=1))
    news = News(outputs)
    assert news.lines() == []
    tree.status_json.write_bytes(b"torn")
    assert news.lines() == []
    write_status(disk, tree, status("x", "active", slot=0, step=2))
    assert news.lines() == []
    write_status(disk, tree, status("x", "stopped", step=2))
    assert news.lines() == ["run x: stopped at step 2"]
    assert news.lines() == []
