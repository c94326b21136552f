"""The orchestrator against a made-up server and trainer: exactly which batches it writes, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_orchestrator_fakes import FakeServer, FakeTrainer, make_base, make_run

from graftwork.errors import (
    Busy,
    ConfigError,
    InferenceError,
    ProgramFailed,
    Refused,
    RunError,
    ServerGone,
    StoreError,
)
from graftwork.programs import orchestrator, serving, warm_start
from graftwork.rollouts.client import InferenceClient
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines
from graftwork.store.queue import read_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch):
    monkeypatch.setattr("graftwork.rollouts.client.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("graftwork.rollouts.client.READY_POLL_SECONDS", 0.01)
    monkeypatch.setattr(orchestrator, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(serving, "REFUSED_PAUSE_SECONDS", 0.01)


def files_of(tree):
    return {p.relative_to(tree.rollouts): p.read_bytes() for p in sorted(tree.rollouts.rglob("*")) if p.is_file()}


def whole_run(root, base, **changes):
    """A run from start to end on a server of its own; (tree, trainer, server)."""
    with FakeServer() as server:
        tree = make_run(root, base, server.url, **changes)
        with FakeTrainer(tree) as trainer:
            orchestrator.main(tree.root)
    return tree, trainer, server


def test_a_lockstep_run_writes_each_batch_from_the_version_before_it(tmp_path, base):
    tree, trainer, server = whole_run(tmp_path / "a", base)
    assert [step for step, _ in trainer.seen] == [1, 2, 3, 4]
    assert sorted(p.name for p in tree.rollouts.iterdir()) == ["step_1", "step_2", "step_3", "step_4"]
    rows = read_lines(tree.samples_jsonl)
    assert any(row.get("left_out") for row in rows) and not all(row.get("left_out") for row in rows)
    for step in range(1, 5):
        batch, _ = read_batch(tree, step)
        assert [v.name for v in batch.versions] == [trainer.versions[step - 1]]
        assert batch.versions[0].digest_source == "engine"
        assert batch.orchestrator_state == {"next_step": step + 1, "seed": 0}
        kept = [row["prompt_index"] for row in rows if row["step"] == step and not row.get("left_out")]
        assert [(r.prompt_index, r.sample_index) for r in batch.rollouts] == [(p, s) for p in kept[::2] for s in (0, 1)]
        assert batch.sampled.answers == 6 and batch.sampled.left_out_groups == 3 - len(kept) // 2
        assert batch.sampled.reward_mean == pytest.approx(np.mean([r["reward"] for r in rows if r["step"] == step]))
        for first, second in zip(batch.rollouts[::2], batch.rollouts[1::2], strict=True):
            assert first.advantage + second.advantage == pytest.approx(0, abs=1e-6)
    assert [row["step"] for row in rows] == [step for step in range(1, 5) for _ in range(6)]
    assert rows[0]["prompt"].startswith("reverse: ")
    assert rows[0]["version"] == trainer.versions[0]
    assert all(request["n"] == 2 and len(request["prompt"]) == 3 for request in server.requests)
    assert len({request["seed"] for request in server.requests}) == 4


def test_at_most_one_version_is_served_and_none_before_it_is_needed(tmp_path, base):
    *_, server = whole_run(tmp_path / "a", base)
    assert server.adapters == {}
    paths = [path.rpartition("/")[2].removesuffix("_lora_adapter") for path, _ in server.log]
    assert paths == ["load", "completions", "unload"] * 4


def test_two_runs_write_the_same_bytes(tmp_path, base):
    one, _, _ = whole_run(tmp_path / "a", base)
    two, _, _ = whole_run(tmp_path / "b", base)
    assert files_of(one) == files_of(two)
    assert one.samples_jsonl.read_bytes() == two.samples_jsonl.read_bytes()
    other, _, _ = whole_run(tmp_path / "c", base, seed=1)
    assert files_of(one) != files_of(other)


def test_versions_are_evaluated_and_that_changes_no_batch(tmp_path, base):
    """The start, every second version and the last; the same tasks each time."""
    plain, _, _ = whole_run(tmp_path / "a", base)
    tree, trainer, _ = whole_run(tmp_path / "b", base, evaluation={"interval_steps": 3, "prompts": 2})
    assert files_of(plain) == files_of(tree) and not plain.evals_jsonl.exists()
    rows = read_lines(tree.evals_jsonl)
    assert [(row["step"], row["prompts"], row["failed"]) for row in rows] == [(0, 2, 0), (3, 2, 0), (4, 2, 0)]
    assert [row["version"] for row in rows] == [trainer.versions[step] for step in (0, 3, 4)]


def test_an_evaluation_is_made_once_however_often_the_orchestrator_starts(tmp_path, base):
    whole, _, _ = whole_run(tmp_path / "a", base, evaluation={"interval_steps": 1, "prompts": 2})
    with FakeServer() as server:
        tree = make_run(tmp_path / "b", base, server.url, evaluation={"interval_steps": 1, "prompts": 2})
        with FakeTrainer(tree, ends={2: ("failed", "a test")}), pytest.raises(RunError):
            orchestrator.main(tree.root)
        with FakeTrainer(tree, start_step=2):
            orchestrator.main(tree.root)
    assert tree.evals_jsonl.read_bytes() == whole.evals_jsonl.read_bytes()


def test_too_many_failed_rollouts_end_the_run_with_the_reason(tmp_path, base, server):
    broken = {"name": f"{FakeServer.__module__}:Breaks", "options": {"every": 3}}
    whole_run(tmp_path / "a", base, environment=broken)
    tree = make_run(tmp_path / "b", base, server.url, environment=broken, max_failed_share=0.3)
    with FakeTrainer(tree), pytest.raises(RunError, match=r"2 of 6 rollouts of batch 1 failed.*0\.3.*OSError: broken"):
        orchestrator.main(tree.root)
    assert files_of(tree) == {}


def test_a_fixed_lag_samples_ahead(tmp_path, base):
    tree, trainer, _ = whole_run(tmp_path / "a", base, lag_steps=2)
    used = [read_batch(tree, step)[0].versions[0].name for step in range(1, 5)]
    assert used == [trainer.versions[0], trainer.versions[0], trainer.versions[0], trainer.versions[1]]
    again, _, _ = whole_run(tmp_path / "b", base, lag_steps=2)
    assert files_of(tree) == files_of(again)


def test_resume_in_the_middle_writes_what_the_whole_run_wrote(tmp_path, base):
    whole, _, _ = whole_run(tmp_path / "whole", base)
    with FakeServer() as server:
        tree = make_run(tmp_path / "cut", base, server.url)
        with FakeTrainer(tree, ends={3: ("stopped", None)}):
            orchestrator.main(tree.root)
    # Batch 3 was published, the checkpoint is at step 2; the log has rows of a batch that never was, and a torn line.
    with tree.samples_jsonl.open("a") as file:
        file.write(json.dumps({"step": 4, "prompt": "never published"}) + '\n{"step": 4, "pro')
    Disk().make_folder(tree.rollouts / ".staging-step_4-dead")
    published = files_of(tree)
    assert {path.parts[0] for path in published} == {"step_1", "step_2", "step_3"}
    with FakeServer() as server:
        make_run(tmp_path / "cut", base, server.url, resume=True)
        with FakeTrainer(tree, start_step=2) as trainer:
            orchestrator.main(tree.root)
    assert [step for step, _ in trainer.seen] == [3, 4]
    assert len(server.requests) == 1
    assert files_of(tree) == files_of(whole)
    assert tree.samples_jsonl.read_bytes() == whole.samples_jsonl.read_bytes()


def test_a_stale_batch_is_made_again(tmp_path, base, server):
    tree = make_run(tmp_path, base, server.url, lag_steps=1)
    with FakeTrainer(tree, set_aside={2}, step_seconds=0.05) as trainer:
        orchestrator.main(tree.root)
    assert [step for step, _ in trainer.seen] == [1, 2, 3, 4]
    steps = [row["step"] for row in read_lines(tree.samples_jsonl)]
    assert sorted(steps) == [step for step in range(1, 5) for _ in range(6)]


def test_a_version_that_was_not_kept_is_replaced_by_the_start(tmp_path, base, server, caplog):
    tree = make_run(tmp_path, base, server.url, lag_steps=1, resume=True)
    with FakeTrainer(tree, start_step=2) as trainer:
        orchestrator.main(tree.root)
    assert read_batch(tree, 3)[0].versions[0].name == trainer.versions[0]
    assert "version 1 is not kept" in caplog.text


def test_a_server_without_digests_claims_and_gets_no_seed(tmp_path, base):
    with FakeServer(tells_digest=False) as server:
        tree = make_run(tmp_path, base, server.url)
        with FakeTrainer(tree):
            orchestrator.main(tree.root)
    version = read_batch(tree, 2)[0].versions[0]
    assert version.digest_source == "claimed"
    assert version.digest.startswith(version.name[-8:])
    assert not any("seed" in request for request in server.requests)
    assert version.probe is not None and version.probe["outcome"] == "verified"


def test_a_disk_that_is_full_ends_it_with_the_reason_and_a_resume_goes_on(tmp_path, base, server, monkeypatch):
    tree = make_run(tmp_path, base, server.url)

    def append(self, path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Disk, "append", append)
    with FakeTrainer(tree):
        with pytest.raises(StoreError, match=r"run tiny: batch 1 cannot be written .*No space left.* resume the run"):
            orchestrator.main(tree.root)
        assert not tree.batch(1).exists()
        monkeypatch.undo()
        orchestrator.main(tree.root)
    assert read_batch(tree, 4) is not None


def test_what_an_earlier_orchestrator_left_in_inference_is_unloaded(tmp_path, base, server):
    server.adapters = {"tiny@7-00000000": "x", "other@7-00000000": "x", "by-hand": "x"}
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree):
        orchestrator.main(tree.root)
    assert list(server.adapters) == ["other@7-00000000", "by-hand"]
    assert server.log[0] == ("/v1/unload_lora_adapter", "tiny@7-00000000")


# --- how it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "evicted"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_ends_badly_ends_it_with_the_reason(tmp_path, base, server, state, step):
    tree = make_run(tmp_path, base, server.url)
    reason = "batch 3 holds garbage"
    with FakeTrainer(tree, ends={step: (state, reason)}), pytest.raises(RunError) as caught:
        orchestrator.main(tree.root)
    assert all(word in str(caught.value) for word in ("run tiny", state, reason, "status.json"))
    assert server.adapters == {}


def test_failure_after_the_last_batch_is_noticed(tmp_path, base, server):
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree, max_steps=9, ends={4: ("failed", "late")}), pytest.raises(RunError, match="late"):
        orchestrator.main(tree.root)
    assert len(server.requests) == 4


def test_a_finished_run_is_left_alone(tmp_path, base, server):
    tree, _, _ = whole_run(tmp_path, base)
    before = files_of(tree)
    orchestrator.main(tree.root)
    assert files_of(tree) == before


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_is_stopped_ends_it_well(tmp_path, base, server, caplog, step):
    caplog.set_level("INFO")
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree, ends={step: ("stopped", None)}):
        orchestrator.main(tree.root)
    assert f"run tiny: stopped at step {step}; `graftwork resume` goes on" in caplog.text
    assert server.adapters == {}


def test_a_stop_is_known_by_the_orch_toml_that_asks_for_it(tmp_path, base, server):
    """`graftwork stop` changes the file, so what the trainer says then is about another file than this one's."""
    tree = make_run(tmp_path, base, server.url)

    class Stopping(FakeTrainer):
        def say(self, state, step, reason=None):
            if state == "stopped":
                make_run(tmp_path, base, server.url, stop=True)
            super().say(state, step, reason)

    with Stopping(tree, ends={2: ("stopped", None)}):
        orchestrator.main(tree.root)
    assert [p.name for p in sorted(tree.rollouts.iterdir())][:2] == ["step_1", "step_2"]
    with pytest.raises(ConfigError, match=r"stop = true.*`graftwork resume`"):
        orchestrator.main(tree.root)


@pytest.mark.parametrize("change", ["stop", "seed", "none", "gone"])
def test_what_becomes_of_the_run_is_noticed_while_it_waits_in_line(tmp_path, base, server, change, caplog):
    """The change is made in the first pause; the look after it must see it."""
    caplog.set_level("INFO")
    tree = make_run(tmp_path, base, server.url)
    pauses = []

    async def pause(self):
        pauses.append(self)
        if change == "gone":
            shutil.rmtree(tree.root)
        elif change == "none":
            tree.orch_toml.unlink()
        else:
            make_run(tmp_path, base, server.url, **{change: True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator.Pauses, "pause", pause)
        if change == "stop":
            orchestrator.main(tree.root)
            assert "stopped, as its orch.toml asks" in caplog.text
        else:
            kind, words = (RunError, "was removed") if change == "gone" else (ConfigError, "changed under this")
            with pytest.raises(kind, match=words):
                orchestrator.main(tree.root)
    assert len(pauses) == 1
    assert server.log == []


# --- an inference server that goes away -----------------------------------------------------------------------------


@pytest.fixture
def comes_back(server, monkeypatch):
    """Once the server is dead, every third look at its health finds a new process."""
    health, looks = InferenceClient.health, []

    async def look(self, *args, **options):
        if server.dead:
            looks.append("")
            if len(looks) % 3 == 0:
                server.start_again()
        await health(self, *args, **options)

    monkeypatch.setattr(InferenceClient, "health", look)


TWO_TURNS = {"name": "test_orchestrator_fakes:TwoTurns"}


@pytest.mark.parametrize("last_words", [False, True])
def test_a_server_that_dies_in_mid_batch_and_comes_back_gives_the_same_batches(
    tmp_path, base, server, comes_back, caplog, last_words
):
    undisturbed, *_ = whole_run(tmp_path / "a", base, environment=TWO_TURNS)
    server.die_at = {4}  # the second turn of batch 2
    server.fail_at = {4} if last_words else set()
    tree = make_run(tmp_path / "b", base, server.url, environment=TWO_TURNS)
    with FakeTrainer(tree):
        orchestrator.main(tree.root)
    assert files_of(tree) == files_of(undisturbed)
    assert tree.samples_jsonl.read_bytes() == undisturbed.samples_jsonl.read_bytes()
    assert caplog.text.count("waiting up to 300 seconds for inference") == 1
    prompts = [request["prompt"] for request in server.requests]
    assert prompts[4] == prompts[2]
    assert server.adapters == {}


def test_a_server_that_has_forgotten_the_version_gets_it_again(tmp_path, base, server, caplog):
    undisturbed, *_ = whole_run(tmp_path / "a", base, environment=TWO_TURNS)
    server.forget_at = {2, 3, 7}  # batch 1 in its second turn, then in its first; batch 2 in its second
    tree = make_run(tmp_path / "b", base, server.url, environment=TWO_TURNS)
    with FakeTrainer(tree):
        orchestrator.main(tree.root)
    assert files_of(tree) == files_of(undisturbed)
    assert tree.samples_jsonl.read_bytes() == undisturbed.samples_jsonl.read_bytes()
    assert caplog.text.count("is begun again") == 3


def test_a_version_that_is_refused_again_and_again_is_an_error(tmp_path, base, server):
    server.forget_at = set(range(1, 100))
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree), pytest.raises(Refused, match="no model tiny@0-"):
        orchestrator.main(tree.root)
    assert len(server.requests) == serving.REFUSALS_MAX
    assert files_of(tree) == {}


def test_a_batch_that_brings_the_server_down_each_time_is_given_up(tmp_path, base, server, comes_back, monkeypatch):
    monkeypatch.setattr(serving, "LOSSES_MAX", 3)
    server.die_at = set(range(1, 100))
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree), pytest.raises(ServerGone, match="/v1/completions"):
        orchestrator.main(tree.root)
    assert len(server.requests) == 3


def test_a_server_that_stays_away_is_named(tmp_path, base, server, monkeypatch):
    monkeypatch.setattr(serving, "INFERENCE_START_SECONDS", 0.1)
    server.die_at = {2}
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree), pytest.raises(ServerGone) as caught:
        orchestrator.main(tree.root)
    assert all(
        word in str(caught.value) for word in (server.url, "/v1/completions", "within 0.1 seconds", "resume the run")
    )
    assert [p.name for p in tree.rollouts.iterdir()] == ["step_1"]


@pytest.mark.parametrize("state", ["failed", "evicted", "stopped", "removed"])
def test_the_end_of_the_run_is_noticed_while_inference_is_away(tmp_path, base, server, caplog, state):
    caplog.set_level("INFO")
    tree = make_run(tmp_path, base, server.url)
    trainer = FakeTrainer(tree)
    server.die_at = {2}
    server.when_dead = (
        (lambda: tree.root.rename(tmp_path / "away"))
        if state == "removed"
        else lambda: trainer.say(state, 1, "a reason")
    )
    with trainer:
        if state == "stopped":
            orchestrator.main(tree.root)
            assert "stopped at step 1" in caplog.text
        else:
            with pytest.raises(RunError, match="was removed" if state == "removed" else f"{state} at step 1: a reason"):
                orchestrator.main(tree.root)


def test_a_fault_of_a_server_that_is_well_ends_it(tmp_path, base, server):
    server.fail_at = {2}
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree), pytest.raises(InferenceError, match="500: the engine failed"):
        orchestrator.main(tree.root)
    assert len(server.requests) == 2


def test_a_server_that_is_there_but_does_not_answer_ends_it(tmp_path, base, server):
    server.hang_at = {1}
    tree = make_run(tmp_path, base, server.url, request_timeout_seconds=3)
    with FakeTrainer(tree), pytest.raises(InferenceError, match=r"no answer within 3 s.*request_timeout_seconds"):
        orchestrator.main(tree.root)


@pytest.mark.parametrize("trouble", ["base", "digest"])
def test_nothing_is_kept_that_another_adapter_sampled(tmp_path, base, server, trouble):
    server.answer_as = "base" if trouble == "base" else None
    server.wrong_digest = trouble == "digest"
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree), pytest.raises(InferenceError, match=r"tiny@0-.*nothing of th"):
        orchestrator.main(tree.root)
    assert files_of(tree) == {}
    assert not tree.samples_jsonl.exists()


def test_one_orchestrator_a_run(tmp_path, base, server):
    tree = make_run(tmp_path, base, server.url)
    claim = Disk().claim(tree.orchestrator_lock, "another orchestrator")
    with pytest.raises(Busy, match="another orchestrator"):
        orchestrator.main(tree.root)
    claim.release()


def test_a_missing_or_changed_orch_toml(tmp_path, base, server):
    with pytest.raises(ConfigError, match=r"orch\.toml"):
        orchestrator.main(tmp_path / "run_none")
    tree = make_run(tmp_path, base, server.url, environment={"name": "reverse_txt"})
    with pytest.raises(ConfigError, match="reverse_text"):
        orchestrator.main(tree.root)


# --- warm start -----------------------------------------------------------------------------------------------------


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A `graftwork convert` of the test's own: it writes down how it was called, or refuses."""
    script = tmp_path / "converter.py"
    script.write_text(
        "import sys, pathlib\n"
        "*_, command, seed_flag, seed, adapter, run = sys.argv\n"
        "if 'bad' in adapter: sys.exit('error: rank 99 does not fit')\n"
        "folder = pathlib.Path(run, 'checkpoints', 'step_0'); folder.mkdir(parents=True)\n"
        "(folder / 'STABLE').write_text(f'{command} {seed_flag} {seed} {adapter}')\n"
    )
    runner = tmp_path / "python"
    runner.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    runner.chmod(0o755)
    monkeypatch.setattr(warm_start.sys, "executable", str(runner))


def test_a_warm_start_converts_the_adapter_once(tmp_path, base, server, converter):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tree = make_run(tmp_path, base, server.url, init_adapter_path=str(adapter))
    with FakeTrainer(tree):
        orchestrator.main(tree.root)
    assert (tree.checkpoint(0) / "STABLE").read_text() == f"convert --seed 0 {adapter}"
    adapter.rmdir()
    orchestrator.main(tree.root)


def test_an_adapter_that_is_absent_or_refused_is_named(tmp_path, base, server, converter):
    tree = make_run(tmp_path, base, server.url, init_adapter_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        orchestrator.main(tree.root)
    bad = tmp_path / "bad"
    bad.mkdir()
    make_run(tmp_path, base, server.url, init_adapter_path=str(bad))
    with pytest.raises(ProgramFailed) as caught:
        orchestrator.main(tree.root)
    assert str(bad) in str(caught.value)
    assert "rank 99 does not fit" in str(caught.value)


# --- as a process ---------------------------------------------------------------------------------------------------

TORCH_FREE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_orchestrator_fakes import FakeServer, FakeTrainer, make_base, make_run
from graftwork.programs import orchestrator
root = Path(sys.argv[2])
with FakeServer() as server:
    tree = make_run(root, make_base(root / "base"), server.url, max_steps=1)
    with FakeTrainer(tree, max_steps=1) as trainer:
        orchestrator.main(tree.root)
assert [step for step, _ in trainer.seen] == [1]
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "vllm"}))
"""


def in_a_process(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_step_is_made_without_torch(tmp_path):
    process = in_a_process("-c", TORCH_FREE, Path(__file__).parent, tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "[]"), err


def test_sigterm_ends_it_cleanly(tmp_path, base, server):
    tree = make_run(tmp_path, base, server.url)
    with FakeTrainer(tree, step_seconds=3):
        script = "import sys; from pathlib import Path; from graftwork.programs.orchestrator import main"
        process = in_a_process("-c", f"{script}; main(Path(sys.argv[1]))", tree.root)
        deadline = time.monotonic() + 60
        while not (tree.batch(1) / "STABLE").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert server.adapters == {}
    assert list(tree.rollouts.glob(".staging-*")) == []
    assert np.isfinite([r.reward for r in read_batch(tree, 1)[0].rollouts]).all()
