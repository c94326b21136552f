"""`graftwork monitor`: what is forwarded, once each, and read back from what the packages themselves wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graftwork.config.load import digest
from graftwork.errors import Busy, ConfigError
from graftwork.programs import monitor as program
from graftwork.programs.monitor import MONITORS, Forwarder, Values, has_ended, main, values_of
from graftwork.programs.monitors.to_trackio import Trackio
from graftwork.programs.monitors.to_wandb import BLOCK_BYTES, read, records
from graftwork.programs.plot import find
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import Status, write_status

ROOT = Path(__file__).parents[2]
ORCH_TOML = b'id = "a"\n'


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "reward": step / 8, "kl": None, "skipped": False, "version": f"a-step{step}", **values}


def write(folder: Path, steps: Sequence[int], evals: Sequence[int] = (), **values: Any) -> Path:
    """A run's logs; those of the metrics with a line that nobody can read, and a torn end."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row(k, **values)) + "\n" for k in steps]
    (folder / "metrics.jsonl").write_text("".join(["no json\n", *lines, '{"step": 99, "rew']))
    lines = [json.dumps({"step": k, "reward": k / 4, "version": "v"}) + "\n" for k in evals]
    (folder / "evals.jsonl").write_text("".join(lines))
    return folder


def say(folder: Path, state: Any) -> None:
    """The run's status, about the orch.toml that is there."""
    tree = RunTree.at(folder)
    (folder / "control").mkdir(exist_ok=True)
    tree.orch_toml.write_bytes(ORCH_TOML)
    write_status(Disk(), tree, Status(str(tree.id), state, digest(ORCH_TOML), arrival=1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run `a` with three steps, of which two versions were evaluated."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "outputs" / "run_a", [1, 2, 3], evals=[0, 2])


@dataclass
class Recorder:
    """A Monitor that keeps what it was given."""

    folders: Mapping[str, Path] = field(default_factory=dict)
    there: Values = field(default_factory=dict)
    calls: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    """Since it began again last."""
    begun_again: int = 0
    closed: bool = False

    def logged(self, run: str) -> Values:
        return dict(self.there)

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self.calls.append((run, step, dict(values)))

    def begin_again(self, run: str) -> None:
        self.begun_again += 1
        self.calls.clear()

    def close(self) -> None:
        self.closed = True

    def hint(self) -> str:
        return "look here"

    def steps(self, name: str) -> list[int]:
        return [step for _, step, values in self.calls if name in values]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(program, "MONITORS", {"recorder": lambda folders: recorder})
    monkeypatch.setattr(program, "POLL_SECONDS", 0.01)
    return recorder


# --- what is forwarded ------------------------------------------------------------------------------------------------


def test_numbers_are_forwarded_and_nothing_else() -> None:
    odd = row(3, large=10**400, endless=float("inf"), none=float("nan"), list=[1])
    assert values_of([odd, row(-1), row(2**63)], "train") == {(3, "train/reward"): 0.375, (3, "train/skipped"): 0.0}


def test_once_each(folder: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    main("outputs", ["a"], "recorder", follow=False)
    assert (recorder.steps("train/reward"), recorder.steps("heldout/reward")) == ([1, 2, 3], [0, 2])
    assert [step for _, step, _ in recorder.calls] == [0, 1, 2, 3]  # all of a step at once
    assert recorder.closed
    assert capsys.readouterr().out == "a: 4 new steps\nlook here\n"


def test_what_is_there_is_not_forwarded_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Value by value: the held-out reward of a step may come after later steps' metrics."""
    recorder = Recorder(there=values_of([row(1), row(2)], "train"))
    forwarder = Forwarder(find("outputs", "a"), recorder)
    forwarder.forward()
    assert (recorder.steps("train/reward"), recorder.steps("heldout/reward")) == ([3], [0, 2])
    forwarder.forward()
    write(folder, [1, 2, 3, 4], evals=[0, 2, 3])
    forwarder.forward()
    assert (recorder.steps("train/reward"), recorder.steps("heldout/reward")) == ([3, 4], [0, 2, 3])
    assert capsys.readouterr().err == ""


def test_32_bits_of_a_number_are_the_number(folder: Path) -> None:
    write(folder, [1], loss=0.1, norm=1e39, tiny=1e-46)
    there = {**values_of([row(1, loss=0.10000000149011612, tiny=0.0)], "train"), (1, "train/norm"): float("inf")}
    recorder = Recorder(there=there)
    Forwarder(find("outputs", "a"), recorder).forward()
    assert (recorder.begun_again, recorder.calls) == (0, [])


def test_a_run_that_went_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resume cuts the logs back and goes on, with other figures; whether a monitor looks on or comes later."""
    write(folder, [1, 2, 3], evals=[0, 2], train_seconds=1.0)
    recorder = Recorder()
    forwarder = Forwarder(find("outputs", "a"), recorder)
    forwarder.forward()
    there = dict(forwarder.there)
    write(folder, [1], evals=[0], train_seconds=1.0)
    forwarder.forward()
    assert (recorder.begun_again, recorder.steps("train/reward"), recorder.steps("heldout/reward")) == (1, [1], [0])
    assert "a: its log is another one from step 2 on than the one that was forwarded" in capsys.readouterr().err

    rows = [*(row(k, train_seconds=1.0) for k in (1, 2)), *(row(k, train_seconds=2.0) for k in (3, 4, 5))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))  # longer than it was
    late = Recorder(there=there)
    Forwarder(find("outputs", "a"), late).forward()
    assert (late.begun_again, late.steps("train/reward")) == (1, [1, 2, 3, 4, 5])
    assert [values["train/train_seconds"] for _, step, values in late.calls if step in (2, 3)] == [1.0, 2.0]
    assert "from step 2 on" in capsys.readouterr().err  # of the evaluations, which were cut too


def test_a_log_without_a_step_changes_nothing(folder: Path) -> None:
    """It was removed, or is that of a run that went back to its very start and has not made a step yet."""
    recorder = Recorder()
    forwarder = Forwarder(find("outputs", "a"), recorder)
    forwarder.forward()
    write(folder, [], evals=[])
    forwarder.forward()
    (folder / "metrics.jsonl").unlink()
    forwarder.forward()
    assert (recorder.begun_again, len(recorder.calls)) == (0, 4)


def test_follow_ends_with_the_run_and_misses_nothing(
    folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation comes after the trainer has said that the run is finished."""
    orchestrator = Disk().claim(RunTree.at(folder).orchestrator_lock, "the orchestrator")
    say(folder, "active")

    def finished() -> None:
        write(folder, [1, 2, 3, 4, 5], evals=[0, 2])
        say(folder, "finished")

    def evaluated() -> None:
        write(folder, [1, 2, 3, 4, 5], evals=[0, 2, 5])
        orchestrator.release()

    later = iter([lambda: write(folder, [1, 2, 3, 4], evals=[0, 2]), finished, evaluated])
    monkeypatch.setattr(time, "sleep", lambda _: next(later)())
    main("outputs", ["a"], "recorder", follow=True)
    assert (recorder.steps("train/reward"), recorder.steps("heldout/reward")) == ([1, 2, 3, 4, 5], [0, 2, 5])
    assert next(later, None) is None


def test_a_run_that_vanishes_ends_and_the_others_go_on(
    folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(folder.with_name("run_b"), [1])
    say(folder, "active")
    say(other, "active")

    def finished() -> None:
        write(other, [1, 2])
        say(other, "finished")

    later = iter([lambda: shutil.rmtree(folder), finished])
    monkeypatch.setattr(time, "sleep", lambda _: next(later)())
    main("outputs", ["a", "b"], "recorder", follow=True)
    assert [step for run, step, _ in recorder.calls if run == "b"] == [1, 2]


def test_when_a_run_has_ended(folder: Path) -> None:
    tree = RunTree.at(folder)
    assert not has_ended(tree)  # no trainer has seen it yet
    for state, ended in (("queued", False), ("active", False), ("stopped", True), ("failed", True)):
        say(folder, state)
        assert has_ended(tree) == ended
    tree.orch_toml.write_bytes(ORCH_TOML + b"max_steps = 9\n")  # resumed: the status is about what was
    assert not has_ended(tree)
    tree.orch_toml.unlink()
    assert has_ended(tree)
    folder.rename(folder.with_name("gone"))
    assert has_ended(tree)


def test_what_is_refused(folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("sft"), [1])
    with pytest.raises(ConfigError, match="--to nowhere is not known; there are: recorder"):
        main("outputs", ["a"], "nowhere", follow=False)
    with pytest.raises(ConfigError, match="did you mean a"):
        main("outputs", ["aa"], "recorder", follow=False)
    with pytest.raises(ConfigError, match="--follow: sft is no run's folder"):
        main("outputs", ["sft"], "recorder", follow=True)
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID is set"):
        monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
        Trackio({"a": folder})
    with pytest.raises(ConfigError, match="2 runs, and trackio keeps one folder a process"):
        monkeypatch.delenv("TRACKIO_SPACE_ID")
        monkeypatch.delenv("TRACKIO_DIR", raising=False)
        Trackio({"a": folder, "b": folder})
    held = Disk().claim(folder / "monitor" / "recorder" / ".lock", "another")
    with pytest.raises(Busy, match="in use by another"):
        main("outputs", ["a"], "recorder", follow=False)
    held.release()
    main("outputs", ["a", "sft"], "recorder", follow=False)


@pytest.mark.parametrize("name", MONITORS)
def test_a_package_that_is_not_there_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    for variable in ("WANDB_ERROR_REPORTING", "TRACKIO_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    with pytest.raises(ConfigError, match=rf"pip install 'graftwork\[{name}\]'"):
        main("outputs", ["a"], name, follow=False)


def test_the_command_loads_no_package_that_it_does_not_use() -> None:
    names = ("torch", "matplotlib", "tensorboard", "wandb", "trackio")
    code = f"import sys, graftwork.programs.monitor; print([name for name in {names!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- what the packages wrote ------------------------------------------------------------------------------------------


def graftwork(*arguments: str, **environment: str) -> str:
    """What the command prints; in a process of its own, since these packages keep threads and settings in theirs."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "graftwork", *arguments], capture_output=True, text=True, timeout=120,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def forward(folder: Path, to: str, **environment: str) -> str:
    """Three steps; in another process a fourth and a late held-out reward; nothing new after that; then the run has
    gone back to step 2, and on from there. Returns the hint."""
    assert "a: 4 new steps\n" in graftwork("monitor", "a", "--to", to, **environment)
    write(folder, [1, 2, 3, 4], evals=[0, 2, 3])
    assert "a: 2 new steps\n" in graftwork("monitor", "a", "--to", to, **environment)
    news, hint = graftwork("monitor", "a", "--to", to, **environment).splitlines()
    assert news == "a: no new steps"
    write(folder, [1, 2], evals=[0, 2])
    with (folder / "metrics.jsonl").open("w") as log:
        log.writelines(json.dumps(one) + "\n" for one in (row(1), row(2), row(3, reward=0.75)))
    assert "a: 4 new steps\n" in graftwork("monitor", "a", "--to", to, **environment)
    assert "a: no new steps\n" in graftwork("monitor", "a", "--to", to, **environment)
    return hint


EXPECTED = {"train/reward": [(1, 0.125), (2, 0.25), (3, 0.75)], "heldout/reward": [(0, 0.0), (2, 0.5)]}
"""In the end."""


def test_tensorboard(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert forward(folder, "tensorboard") == "tensorboard --logdir outputs/run_a/monitor/tensorboard"
    events = EventAccumulator(str(folder / "monitor" / "tensorboard"))
    events.Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in EXPECTED}
    assert found == EXPECTED
    assert [event.value for event in events.Scalars("train/skipped")] == [0.0] * 3
    assert "train/kl" not in events.Tags()["scalars"]


Curves = dict[str, list[tuple[int, float]]]


def in_wandb(folder: Path) -> list[tuple[bool, Curves]]:
    """Of each W&B run, in order: whether it began again, and what was logged."""
    files = sorted((folder / "monitor" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    found = [read(file) for file in files]
    return [(anew, {n: [(x["step"], x[n]) for x in lines if n in x] for n in EXPECTED}) for anew, lines in found]


def test_wandb_offline(folder: Path) -> None:
    pytest.importorskip("wandb")
    hint = forward(folder, "wandb")
    assert in_wandb(folder) == [
        (False, {"train/reward": [(1, 0.125), (2, 0.25), (3, 0.375)], "heldout/reward": [(0, 0.0), (2, 0.5)]}),
        (False, {"train/reward": [(4, 0.5)], "heldout/reward": [(3, 0.75)]}),
        (True, EXPECTED),
    ]
    assert len(list(Path().glob(hint.removeprefix("wandb sync ")))) == 3  # a start that had something new


def test_wandb_after_a_kill(folder: Path) -> None:
    """What it had not written yet is forwarded by the next start; what it had is not forwarded again."""
    pytest.importorskip("wandb")
    say(folder, "active")
    command = [sys.executable, "-m", "graftwork", "monitor", "a", "--to", "wandb", "--follow"]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    files = folder / "monitor" / "wandb" / "wandb"
    deadline = time.monotonic() + 60
    while not list(files.glob("offline-run-*/*.wandb")) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    write(folder, [1, 2, 3, 4], evals=[0, 2, 3])
    say(folder, "finished")
    time.sleep(1)  # W&B's own process writes out what it was given before it ends
    graftwork("monitor", "a", "--to", "wandb", "--follow")
    found = in_wandb(folder)
    assert {name: sorted(point for _, curves in found for point in curves[name]) for name in EXPECTED} == {
        "train/reward": [(k, k / 8) for k in (1, 2, 3, 4)], "heldout/reward": [(k, k / 4) for k in (0, 2, 3)],
    }  # fmt: skip


def test_records_that_cross_blocks_and_a_torn_end() -> None:
    """Of a `.wandb` file made by hand: a record that is cut at a block's end, and one that is not all there."""

    def piece(data: bytes, kind: int) -> bytes:
        return b"\0\0\0\0" + len(data).to_bytes(2, "little") + bytes([kind]) + data

    data = bytes(7) + piece(b"short", 1)
    rest = BLOCK_BYTES - len(data) - 7
    data += piece(b"x" * rest, 2) + piece(b"yy", 4)
    assert len(data) > BLOCK_BYTES
    data += bytes(0) + piece(b"z" * (BLOCK_BYTES - len(data) % BLOCK_BYTES - 7 - 3), 1) + bytes(3) + piece(b"next", 1)
    whole = [b"short", b"x" * rest + b"yy", b"z" * (2 * BLOCK_BYTES - BLOCK_BYTES - 9 - 7 - 3), b"next"]
    assert list(records(data)) == whole
    assert list(records(data[:-1])) == whole[:-1]
    assert list(records(data + bytes(40))) == whole


def test_trackio(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    forward(folder, "trackio")
    assert in_trackio(folder / "monitor" / "trackio", "a") == EXPECTED
    write(folder.with_name("run_b"), [1])
    together = tmp_path / "together"
    assert "b: 1 new steps\n" in graftwork("monitor", "a", "b", "--to", "trackio", TRACKIO_DIR=str(together))
    assert in_trackio(together, "a") == EXPECTED
    assert in_trackio(together, "b") == {"train/reward": [(1, 0.125)], "heldout/reward": []}


def in_trackio(folder: Path, run: str) -> Curves:
    with sqlite3.connect(folder / "graftwork.db") as connection:
        query = "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id"
        lines = [(step, json.loads(metrics)) for step, metrics in connection.execute(query, [run])]
    return {name: [(step, line[name]) for step, line in lines if name in line] for name in EXPECTED}
