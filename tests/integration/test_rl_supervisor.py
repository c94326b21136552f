"""`graftwork rl` over small fake programs (fake_programs.py). The real ones are tested in the end-to-end tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from graftwork.config.load import build, digest
from graftwork.config.run import RunConfig
from graftwork.config.schema import InferenceSection, RlConfig
from graftwork.errors import BadRunId, Busy, CannotResume, ConfigError, ProgramFailed
from graftwork.programs import rl
from graftwork.programs.orch_toml import publish_orch_toml
from graftwork.programs.start import Start
from graftwork.store.disk import Disk
from graftwork.store.files import read_json
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import Status, write_status

FAKES = (sys.executable, str(Path(__file__).with_name("fake_programs.py")))
WAIT_SECONDS = 30.0


# --- what the tests share ---------------------------------------------------------------------------------------------


def publish_checkpoint(tree: RunTree, step: int) -> None:
    with Disk().publish_dir(tree.checkpoint(step), "checkpoint", {"step": step}) as staging:
        staging.write_json("weight/adapter_config.json", {"r": 4})


def config(tmp_path: Path, **run: Any) -> RlConfig:
    values = {"model": {"path": str(tmp_path)}, "output_dir": str(tmp_path / "outputs"), "run": {"id": "x", **run}}
    return build(RlConfig, values, source="test")


def train(tmp_path: Path, *, resume: bool = False, resume_step: int | None = None, **run: Any) -> None:
    run = {"max_steps": 2, **run}
    rl.main(config(tmp_path, **run), resume=resume, resume_step=resume_step, command=FAKES)


def tree_at(tmp_path: Path) -> RunTree:
    return OutputTree(tmp_path / "outputs").run(RunId("x"))


def pid_of(tmp_path: Path, program: str) -> int:
    outputs = OutputTree(tmp_path / "outputs")
    file = outputs.trainer_json if program == "trainer" else outputs.logs / "inference.json"
    return int(read_json(file, program)["pid"])


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# --- tests ------------------------------------------------------------------------------------------------------------


def test_trains_draws_and_says_what_to_do_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    tree, output = tree_at(tmp_path), capfd.readouterr()
    assert "step 1/2  reward 0.400  1,234 tokens/s" in output.err
    assert "step 2/2  reward 0.500" in output.err
    assert (tree.root / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (tree.root / "loss.png").read_bytes().startswith(b"\x89PNG")
    weight = tree.checkpoint(2) / "weight"
    assert f'"{weight}")' in output.out
    assert f"vllm serve {tmp_path} --enable-lora --max-lora-rank 8 --lora-modules x={weight}" in output.out
    assert not alive(pid_of(tmp_path, "inference"))
    assert "graftwork trainer" in (tmp_path / "outputs/logs/trainer.log").read_text()


def test_resume_goes_on_and_shows_only_new_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    capfd.readouterr()
    train(tmp_path, resume=True, max_steps=4)
    shown = capfd.readouterr().err
    assert "training from step 2 to 4" in shown
    assert [f"step {step}/4" in shown for step in (1, 2, 3, 4)] == [False, False, True, True]
    assert tomllib.loads(tree_at(tmp_path).orch_toml.read_text())["resume"] is True


def test_a_second_start_must_ask_to_resume(tmp_path: Path) -> None:
    train(tmp_path)
    before = tree_at(tmp_path).orch_toml.read_bytes()
    with pytest.raises(ConfigError, match=r"run_x already has checkpoints up to step 2 .*--resume goes on from there"):
        train(tmp_path)
    assert tree_at(tmp_path).orch_toml.read_bytes() == before


@pytest.mark.parametrize("step", [None, 3])
def test_resume_needs_a_checkpoint(tmp_path: Path, step: int | None) -> None:
    with pytest.raises(CannotResume, match="nothing to go on from"):
        train(tmp_path, resume=True, resume_step=step)
    assert not (tmp_path / "outputs").exists()


def test_resume_beyond_the_last_step(tmp_path: Path) -> None:
    publish_checkpoint(tree_at(tmp_path), 10)
    with pytest.raises(
        CannotResume, match="its checkpoint is of step 10, and max_steps is 2: --max-steps sets a later"
    ):
        train(tmp_path, resume=True)


def test_vllm_that_is_not_installed_is_told_before_anything_starts(tmp_path: Path) -> None:
    """An interpreter that sees no packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python, says in ((bare, "vLLM is not installed for"), (tmp_path / "none", "cannot start .*none")):
        values = {"engine": "vllm", "vllm": {"python": str(python)}}
        wanted = config(tmp_path).model_copy(update={"inference": build(InferenceSection, values, source="test")})
        with pytest.raises(ConfigError, match=says):
            rl.main(wanted, resume=False, resume_step=None, command=FAKES)
    assert not (tmp_path / "outputs").exists()


def test_resume_from_a_step_that_is_not_there(tmp_path: Path) -> None:
    publish_checkpoint(tree_at(tmp_path), 10)
    with pytest.raises(CannotResume, match=r"no checkpoint of step 7 .* there are steps 10"):
        train(tmp_path, resume_step=7)


def test_a_start_that_was_cut_short_must_ask_to_resume(tmp_path: Path) -> None:
    tree = tree_at(tmp_path)
    publish_checkpoint(tree, 0)
    with Disk().publish_dir(tree.batch(1), "batch", {}):
        pass
    with pytest.raises(ConfigError, match=r"before its first checkpoint .*--resume goes on from step 0"):
        train(tmp_path)


def test_missing_adapter_and_bad_id_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter folder at"):
        train(tmp_path, init_adapter_path=str(tmp_path / "none"))
    with pytest.raises(BadRunId, match=r"Bad\.Name"):
        train(tmp_path, id="Bad.Name")
    with pytest.raises(ConfigError, match="no environment 'reverse_txt'; did you mean 'reverse_text'"):
        train(tmp_path, environment={"name": "reverse_txt"})
    with pytest.raises(ConfigError, match="has no option 'min'"):
        train(tmp_path, environment={"options": {"min": 3}})
    assert not (tmp_path / "outputs").exists()


def test_another_trainer_on_the_same_outputs(tmp_path: Path) -> None:
    claim = Disk().claim(OutputTree(tmp_path / "outputs").trainer_lock, "a trainer")
    with pytest.raises(Busy, match="in use by a trainer, pid"):
        train(tmp_path)
    claim.release()
    assert not tree_at(tmp_path).root.exists()


def test_an_unfinished_neighbour_is_named(tmp_path: Path) -> None:
    other = OutputTree(tmp_path / "outputs").run(RunId("other"))
    Disk().publish_file(other.orch_toml, b"max_steps = 3\n")
    with pytest.raises(ConfigError, match="run_other holds a run that is not finished"):
        train(tmp_path)
    write_status(Disk(), other, Status("other", "finished", digest(b"max_steps = 3\n"), 1))
    train(tmp_path)


def test_a_neighbour_that_is_to_stop_is_in_nobodys_way(tmp_path: Path) -> None:
    """It need not have stopped: the trainer that comes releases it, and comes when the other run is there too."""
    other = OutputTree(tmp_path / "outputs").run(RunId("other"))
    stopping = build(RunConfig, {"model": {"path": str(tmp_path)}}, source="test")
    publish_orch_toml(Disk(), other, stopping)
    with pytest.raises(ConfigError, match=r"not seen by a trainer yet.*`graftwork stop other --output-dir .*` ends it"):
        train(tmp_path)
    publish_orch_toml(Disk(), other, stopping.model_copy(update={"stop": True}))
    assert not Start.of(config(tmp_path), resume=False, resume_step=None).settled()
    train(tmp_path)


def test_the_same_orch_toml_again_is_a_new_start(tmp_path: Path) -> None:
    """The fakes answer under one URL, so both resumes write the same bytes."""
    train(tmp_path)
    train(tmp_path, resume=True, max_steps=3)
    first = digest(tree_at(tmp_path).orch_toml.read_bytes())
    Disk().quarantine(tree_at(tmp_path).checkpoint(3), tmp_path / "aside")
    train(tmp_path, resume=True, max_steps=3)
    assert digest(tree_at(tmp_path).orch_toml.read_bytes()) == first
    assert list(tree_at(tmp_path).trash.glob("status.json-*"))


@pytest.mark.parametrize(
    ("program", "mood", "message"),
    [
        ("inference", "port taken", r"the inference ended with exit code 1; its log: .*inference.log\n.*port is taken"),
        ("inference", "dies", r"the inference was killed by SIGKILL"),
        ("trainer", "dies", r"(?s)the trainer ended with exit code 1; .*trainer.log.*ValueError: a bug of ours"),
        ("orchestrator", "leaves", r"the orchestrator was stopped from outside before the run was finished"),
        ("trainer", "fails the run", r"run x: failed at step 1: batch 2 is damaged\n  the orchestrator ended with"),
    ],
)
def test_who_failed_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, mood: str, message: str
) -> None:
    monkeypatch.setenv(f"FAKE_{program.upper()}", mood)
    with pytest.raises(ProgramFailed, match=message):
        train(tmp_path, max_steps=20)
    assert tree_at(tmp_path).orch_toml.exists() == (mood != "port taken")


def test_an_orchestrator_that_does_not_follow_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ORCHESTRATOR", "hangs")
    monkeypatch.setattr(rl, "LAST_STATUS_SECONDS", 0.5)
    monkeypatch.setattr("graftwork.programs.processes.Program.end.__defaults__", (0.5,))
    with pytest.raises(ProgramFailed, match="the orchestrator did not follow"):
        train(tmp_path)


def start_in_background(tmp_path: Path) -> subprocess.Popen[bytes]:
    """`graftwork rl` over the fakes as a process of its own, once its trainer trains."""
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    deadline = time.monotonic() + WAIT_SECONDS
    while not tree_at(tmp_path).metrics_jsonl.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_children_end_with_their_parent(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start_in_background(tmp_path)
    children = [pid_of(tmp_path, "inference"), pid_of(tmp_path, "trainer")]
    assert all(alive(pid) for pid in children)
    process.send_signal(number)
    assert process.wait(WAIT_SECONDS) == code
    deadline = time.monotonic() + WAIT_SECONDS
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a child outlived graftwork rl"
        time.sleep(0.05)


if __name__ == "__main__":
    train(Path(sys.argv[1]), max_steps=200)
