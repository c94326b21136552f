"""`graftwork submit`, `stop` and `resume` over fake orchestrators (fake_services.py) and statuses made by hand."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.config.load import build, digest
from graftwork.config.run import SubmitConfig
from graftwork.config.section import ModelConfig
from graftwork.errors import BadRunId, ConfigError, ProgramFailed
from graftwork.programs import orchestrators, submit
from graftwork.programs.orchestrators import end_orchestrator, is_alive, live_orchestrator, pid_in
from graftwork.programs.start import Served, publish_served
from graftwork.store.disk import Claim, Disk
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import State, Status, write_status

FAKES = (sys.executable, str(Path(__file__).with_name("fake_services.py")))
WAIT_SECONDS = 60.0
URL = "http://127.0.0.1:1234"


# --- what the tests share ---------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OutputTree]:
    """Where `graftwork serve` has been; whoever samples there when the test ends is ended."""
    outputs = OutputTree(tmp_path / "outputs")
    (tmp_path / "base").mkdir()
    publish_served(Disk(), outputs, Served(1, URL, ModelConfig(path=str(tmp_path / "base"), dtype="float32")))
    monkeypatch.chdir(tmp_path)
    yield outputs
    monkeypatch.setattr(orchestrators, "END_GRACE_SECONDS", 0.2)
    for tree in outputs.scan()[0]:
        end_orchestrator(tree)


def send(outputs: OutputTree, *ids: str, **settings: Any) -> None:
    """`graftwork submit`, until the fake orchestrators hold their runs."""
    values = {"output_dir": str(outputs.root), **settings}
    submit.submit(build(SubmitConfig, values, source="test"), ids, FAKES)
    for name in ids:
        sampler(outputs.run(RunId(name)))


def sampler(tree: RunTree) -> int:
    """The pid of the orchestrator that was just started for a run, once it holds it. The lock is not tried: that could
    turn it away."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (pid := pid_in(tree)) is None or not is_alive(pid):
        assert time.monotonic() < deadline, "no orchestrator came up"
        time.sleep(0.05)
    return pid


def settings_of(tree: RunTree) -> dict[str, Any]:
    return tomllib.loads(tree.orch_toml.read_text())


def publish_checkpoint(tree: RunTree, step: int) -> None:
    with Disk().publish_dir(tree.checkpoint(step), "checkpoint", {"step": step}):
        pass


def say(tree: RunTree, state: State, **about: Any) -> None:
    """What the trainer would write of the run, under its orch.toml of now."""
    orch = digest(tree.orch_toml.read_bytes())
    write_status(Disk(), tree, Status(str(tree.id), state, orch, 1, **about))


def trainer_breathes(outputs: OutputTree) -> None:
    Disk().publish_json(outputs.liveness_json, {"pid": 1, "time": time.time() + 3600, "runs": {}, "removed": []})


def stopped_run(outputs: OutputTree, name: str = "x", **settings: Any) -> RunTree:
    """A run that was stopped at step 4, with nobody sampling for it."""
    send(outputs, name, **settings)
    tree = outputs.run(RunId(name))
    for step in (0, 2, 4):
        publish_checkpoint(tree, step)
    submit.stop(str(outputs.root), [name], 0)
    say(tree, "stopped", step=4)
    return tree


# --- submit -----------------------------------------------------------------------------------------------------------


def test_many_runs_of_the_same_settings(outputs: OutputTree, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs.root.parent / "sft").mkdir()
    send(outputs, "alpha", "beta", max_steps=7, init_adapter_path="sft")
    trees = [outputs.run(RunId(name)) for name in ("alpha", "beta")]
    assert settings_of(trees[0]) == settings_of(trees[1])
    settings = settings_of(trees[0])
    assert (settings["max_steps"], settings["inference_url"], settings["stop"]) == (7, URL, False)
    assert settings["model"] == {"path": str(outputs.root.parent / "base"), "dtype": "float32", "device": "auto"}
    assert settings["init_adapter_path"] == str(outputs.root.parent / "sft")
    said = capsys.readouterr()
    pids = [sampler(tree) for tree in trees]
    assert [f"(pid {pid})" in line for pid, line in zip(pids, said.out.splitlines(), strict=True)] == [True, True]
    assert "warning: no trainer is running in outputs" in said.err
    assert os.getsid(pids[0]) == pids[0]  # it does not end with the terminal that it was submitted from
    assert "graftwork orchestrator" in (trees[0].logs / "orchestrator.log").read_text()


def test_what_the_file_sets_wins_and_a_trainer_that_lives_is_no_warning(
    outputs: OutputTree, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_breathes(outputs)
    send(outputs, "x", inference_url="http://elsewhere:1", model={"path": "org/hub-id"})
    settings = settings_of(outputs.run(RunId("x")))
    assert (settings["inference_url"], settings["model"]["path"]) == ("http://elsewhere:1", "org/hub-id")
    error = capsys.readouterr().err
    assert "model.path is org/hub-id, and" in error and "no trainer" not in error


def test_refusals_come_before_anything_is_written(outputs: OutputTree, tmp_path: Path) -> None:
    publish_checkpoint(outputs.run(RunId("old")), 20)
    Disk().publish_file(outputs.run(RunId("there")).orch_toml, b"max_steps = 3\n")
    with pytest.raises(BadRunId, match="Not"):
        send(outputs, "fine", "Not.Fine")
    with pytest.raises(ConfigError, match="given twice: a"):
        send(outputs, "a", "a")
    with pytest.raises(
        ConfigError, match=r"(?s)run_old has checkpoints up to step 20: --resume true .*run_there holds"
    ):
        send(outputs, "fine", "old", "there")
    with pytest.raises(ConfigError, match="`graftwork resume there` takes it on"):
        send(outputs, "there", resume=True)
    with pytest.raises(ConfigError, match="init_adapter_path: no adapter folder at") as refused:
        send(outputs, "a", "b", init_adapter_path="nothing")
    assert str(refused.value).count("no adapter folder") == 1
    with pytest.raises(ConfigError, match="nothing to go on from"):
        send(outputs, "fine", resume=True)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7 .* there are steps 20"):
        send(outputs, "old", resume=True, resume_step=7)
    with pytest.raises(ConfigError, match="no environment 'reverse_txt'"):
        send(outputs, "fine", environment={"name": "reverse_txt"})
    with pytest.raises(ConfigError, match="a run is not submitted to be stopped"):
        send(outputs, "fine", stop=True)
    assert sorted(path.name for path in outputs.root.glob("run_*")) == ["run_old", "run_there"]
    assert not outputs.run(RunId("old")).orch_toml.exists()
    with pytest.raises(ConfigError, match=r"model\.path: must be given"):
        send(OutputTree(tmp_path / "empty"), "x")
    assert not (tmp_path / "empty").exists()


def test_a_rank_that_the_trainer_has_no_room_for(outputs: OutputTree) -> None:
    Disk().publish_json(outputs.trainer_json, {"pid": 1, "slots": 4, "max_rank": 16})
    send(outputs, "later", adapter={"rank": 64})  # of a trainer that is gone: the next may have more
    trainer_breathes(outputs)
    with pytest.raises(ConfigError, match=r"adapter\.rank is 64, and the trainer in outputs holds .* rank 16 at most"):
        send(outputs, "x", adapter={"rank": 64})
    send(outputs, "x", adapter={"rank": 16})


def test_a_step_0_and_a_checkpoint_that_a_person_put_there(outputs: OutputTree) -> None:
    warm, ready = outputs.run(RunId("warm")), outputs.run(RunId("ready"))
    publish_checkpoint(warm, 0)
    send(outputs, "warm", init_adapter_path="/was/here")  # imported by hand: the adapter is needed no more
    publish_checkpoint(ready, 10)
    send(outputs, "ready", resume=True)
    assert settings_of(ready)["resume"] is True


def test_a_run_that_came_to_nothing_is_submitted_anew(outputs: OutputTree) -> None:
    """Its settings were refused, say; there is no checkpoint that it could be resumed from."""
    send(outputs, "x", max_steps=7)
    tree = outputs.run(RunId("x"))
    with pytest.raises(ConfigError, match="in use by the orchestrator of run x"):
        send(outputs, "x")
    end_orchestrator(tree)
    with pytest.raises(ConfigError, match="`graftwork stop x` ends it first"):
        send(outputs, "x")
    say(tree, "failed", reason="rank 64 is above max_rank 16")
    with pytest.raises(ConfigError, match=r"nothing to go on from.*`graftwork submit` starts a run anew"):
        take_on(outputs, "x")
    send(outputs, "x", max_steps=9)
    assert settings_of(tree)["max_steps"] == 9
    end_orchestrator(tree)
    say(tree, "failed", step=0)
    with Disk().publish_dir(tree.batch(1), "batch", {}):
        pass
    with pytest.raises(ConfigError, match="`graftwork resume x` takes it on"):
        send(outputs, "x")


@pytest.mark.parametrize("trainer_is_up", [False, True])
def test_a_copied_run_goes_on_under_its_new_id(outputs: OutputTree, trainer_is_up: bool) -> None:
    """A trainer that is up has seen the copy at once, and written a status of its own."""
    original = stopped_run(outputs, "original")
    copy = outputs.run(RunId("copy"))
    shutil.copytree(original.root, copy.root)
    if trainer_is_up:
        say(copy, "failed", reason="it has checkpoints up to step 4 and did not ask to resume")
    with pytest.raises(ConfigError, match="run_copy is a copy of run original: --resume true goes on"):
        send(outputs, "copy")
    assert settings_of(copy)["stop"] is True
    send(outputs, "copy", resume=True, seed=3)
    assert (settings_of(copy)["stop"], settings_of(copy)["seed"]) == (False, 3)
    assert settings_of(original)["seed"] == 0
    end_orchestrator(copy)
    with pytest.raises(ConfigError, match="`graftwork resume copy` takes it on"):  # now it is a run of its own
        send(outputs, "copy", resume=True)


# --- stop -------------------------------------------------------------------------------------------------------------


def test_stop_keeps_all_other_settings_and_ends_the_orchestrator(
    outputs: OutputTree, capsys: pytest.CaptureFixture[str]
) -> None:
    send(outputs, "x", max_steps=9, seed=5)
    tree = outputs.run(RunId("x"))
    before, pid = settings_of(tree), sampler(tree)
    submit.stop(str(outputs.root), ["x"], WAIT_SECONDS)
    assert settings_of(tree) == {**before, "stop": True}
    assert live_orchestrator(tree) is None and not is_alive(pid)
    assert "no trainer is running, the next one will release it" in capsys.readouterr().out


def test_stop_waits_until_the_trainer_says_so(outputs: OutputTree, capsys: pytest.CaptureFixture[str]) -> None:
    send(outputs, "x", "y")
    trees = [outputs.run(RunId(name)) for name in ("x", "y")]
    for tree in trees:
        say(tree, "active", slot=0, step=2)
    trainer_breathes(outputs)

    def trainer() -> None:
        for tree in trees:
            while not settings_of(tree)["stop"]:
                time.sleep(0.05)
        say(trees[0], "stopped", step=3)
        say(trees[1], "failed", step=2, reason="its checkpoint could not be written")

    thread = threading.Thread(target=trainer)
    thread.start()
    submit.stop(str(outputs.root), ["x", "y"], WAIT_SECONDS)
    thread.join()
    assert sorted(capsys.readouterr().out.splitlines()[-2:]) == [
        "x: stopped at step 3", "y: failed at step 2: its checkpoint could not be written",
    ]  # fmt: skip


def test_stop_says_when_the_time_is_over(outputs: OutputTree) -> None:
    send(outputs, "x")
    say(outputs.run(RunId("x")), "active", slot=0, step=2)
    trainer_breathes(outputs)
    with pytest.raises(ProgramFailed, match=r"not stopped within 0\.1 seconds: x"):
        submit.stop(str(outputs.root), ["x"], 0.1)
    with pytest.raises(ProgramFailed, match="not stopped"):  # asked again: the same file, no new start
        submit.stop(str(outputs.root), ["x"], 0.1)


def test_stop_of_a_run_that_has_ended_changes_nothing(outputs: OutputTree, capsys: pytest.CaptureFixture[str]) -> None:
    tree = stopped_run(outputs)
    before = tree.orch_toml.read_bytes()
    submit.stop(str(outputs.root), ["x"], 60)
    assert "x: stopped at step 4; it had ended already, nothing was changed" in capsys.readouterr().out
    assert tree.orch_toml.read_bytes() == before


def test_stop_refuses_before_it_writes(outputs: OutputTree) -> None:
    send(outputs, "x")
    Disk().publish_file(outputs.run(RunId("broken")).orch_toml, b"= =")
    with pytest.raises(ConfigError, match=r"(?s)broken.*is not TOML.*nothing was stopped"):
        submit.stop(str(outputs.root), ["x", "broken"], 0)
    with pytest.raises(ConfigError, match=r"no run y in .*; there are: broken, x"):
        submit.stop(str(outputs.root), ["y"], 0)
    assert settings_of(outputs.run(RunId("x")))["stop"] is False


def test_a_stubborn_orchestrator_is_killed(outputs: OutputTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ORCHESTRATOR", "stubborn")
    monkeypatch.setattr(orchestrators, "END_GRACE_SECONDS", 0.2)
    send(outputs, "x")
    pid = sampler(outputs.run(RunId("x")))
    submit.stop(str(outputs.root), ["x"], 0)
    assert not is_alive(pid)


def test_no_pid_is_signalled_whose_lock_is_not_held(outputs: OutputTree) -> None:
    """A copied folder, or a run from before a reboot: the lock file names a process that is somebody else's now."""
    tree = outputs.run(RunId("x"))
    Disk().publish_file(tree.orchestrator_lock, f"the orchestrator of run x, pid {os.getpid()}\n".encode())
    assert end_orchestrator(tree) is None


@pytest.mark.parametrize("who", ["a graftwork command that only looked", "the orchestrator of run other"])
def test_no_pid_is_signalled_that_is_not_the_runs_own(
    outputs: OutputTree, who: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orchestrators, "LOCK_TRIES", 2)
    tree = outputs.run(RunId("x"))
    Disk().publish_file(tree.orch_toml, b'[model]\npath = "base"\n')
    claim: Claim = Disk().claim(tree.orchestrator_lock, who)  # held by this very process
    submit.stop(str(outputs.root), ["x"], 0)
    assert "is held by somebody who is not its orchestrator" in capsys.readouterr().err
    claim.release()


# --- resume -----------------------------------------------------------------------------------------------------------


def take_on(outputs: OutputTree, *ids: str, max_steps: int | None = None, step: int | None = None) -> None:
    submit.resume(str(outputs.root), ids, max_steps, step, FAKES)
    for name in ids:
        sampler(outputs.run(RunId(name)))


def test_resume_goes_on_where_inference_is_now(outputs: OutputTree, capsys: pytest.CaptureFixture[str]) -> None:
    tree = stopped_run(outputs, seed=5)
    publish_served(Disk(), outputs, Served(1, "http://127.0.0.1:9", ModelConfig(path="base")))
    before = settings_of(tree)
    take_on(outputs, "x", max_steps=30)
    assert settings_of(tree) == {
        **before, "stop": False, "resume": True, "max_steps": 30, "inference_url": "http://127.0.0.1:9",
    }  # fmt: skip
    assert "x: goes on from step 4 to 30; its orchestrator (pid" in capsys.readouterr().out


def test_resume_from_a_step_and_then_from_the_newest(outputs: OutputTree) -> None:
    tree = stopped_run(outputs)
    take_on(outputs, "x", step=2)
    assert settings_of(tree)["resume_step"] == 2
    end_orchestrator(tree)
    say(tree, "failed", step=3)
    take_on(outputs, "x")
    assert "resume_step" not in settings_of(tree)
    first = tree.orch_toml.read_bytes()
    end_orchestrator(tree)
    say(tree, "failed", step=4)
    take_on(outputs, "x")  # the same bytes: the old status would settle this start too
    assert tree.orch_toml.read_bytes() == first
    assert not tree.status_json.exists() and list(tree.trash.glob("status.json-*"))


def test_resume_refuses_what_leads_nowhere(outputs: OutputTree) -> None:
    tree = stopped_run(outputs, max_steps=4)
    before = tree.orch_toml.read_bytes()
    with pytest.raises(ConfigError, match=r"its checkpoint is of step 4, and max_steps is 4: --max-steps sets a later"):
        take_on(outputs, "x")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 .* steps 0, 2, 4"):
        take_on(outputs, "x", step=3)
    with pytest.raises(ConfigError, match="no run y in"):
        take_on(outputs, "x", "y")
    Disk().publish_file(outputs.run(RunId("bare")).orch_toml, before)
    with pytest.raises(ConfigError, match=r"(?s)run bare: nothing to go on from.*nothing was resumed"):
        take_on(outputs, "x", "bare", max_steps=9)
    assert tree.orch_toml.read_bytes() == before


def test_resume_refuses_a_run_that_trains(outputs: OutputTree) -> None:
    send(outputs, "x")
    tree = outputs.run(RunId("x"))
    publish_checkpoint(tree, 0)
    say(tree, "active", slot=1, step=3)
    with pytest.raises(ConfigError, match=r"run x is active in slot 1 at step 3.* `graftwork stop x` comes first"):
        take_on(outputs, "x")
    end_orchestrator(tree)
    before = tree.orch_toml.read_bytes()
    take_on(outputs, "x")  # only its orchestrator was missing
    assert live_orchestrator(tree) is not None and tree.orch_toml.read_bytes() == before


def test_resume_of_a_run_that_is_being_stopped(outputs: OutputTree) -> None:
    send(outputs, "x")
    tree = outputs.run(RunId("x"))
    publish_checkpoint(tree, 0)
    say(tree, "active", slot=1, step=3)
    submit.stop(str(outputs.root), ["x"], 0)
    trainer_breathes(outputs)
    with pytest.raises(ConfigError, match="It is being stopped: try again when it is"):
        take_on(outputs, "x")
    outputs.liveness_json.unlink()  # the trainer is gone: it will never say so
    take_on(outputs, "x")
    assert (settings_of(tree)["stop"], settings_of(tree)["resume"]) == (False, True)


def test_resume_refuses_beside_an_orchestrator_that_lives(outputs: OutputTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "FOLLOW_SECONDS", 0.2)
    send(outputs, "x")
    tree = outputs.run(RunId("x"))
    publish_checkpoint(tree, 0)
    say(tree, "failed", step=3, reason="batch 4 is damaged")
    with pytest.raises(ConfigError, match=r"its orchestrator \(pid \d+\) is still there; `graftwork stop x` ends it"):
        take_on(outputs, "x")
    submit.stop(str(outputs.root), ["x"], 60)
    take_on(outputs, "x")
