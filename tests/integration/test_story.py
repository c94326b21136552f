"""The main job through the command line, with real processes: SFT -> RL from its adapter -> checkpoint -> resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import whole

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.config.load import dump, load
from graftwork.config.run import RunConfig
from graftwork.config.schema import SftConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.lora.linear import Segment
from graftwork.model.base import Route, load_base
from graftwork.model.logprobs import token_logprobs
from graftwork.programs import sft
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines, verify
from graftwork.store.layout import RunTree, stable_steps
from graftwork.store.queue import Batch, read_batch, read_version
from graftwork.store.status import read_status
from graftwork.training.packer import Example

REPOSITORY = Path(__file__).parents[2]
SFT_TOML, RL_TOML = "examples/reverse_text/sft.toml", "examples/reverse_text/rl.toml"
BASE = ModelConfig(path=str(REPOSITORY / "examples/reverse_text/base"), dtype="float32", device="cpu")


def graftwork(*arguments: str, expect: int = 0) -> str:
    """Run a command from the repository; return what it printed."""
    command = [sys.executable, "-m", "graftwork", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == expect, f"{arguments[0]} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds sft/adapter."""
    folder = tmp_path_factory.mktemp("story")
    graftwork("sft", SFT_TOML, "--output_dir", str(folder / "sft"))
    return folder


@pytest.fixture(scope="module")
def story(outputs: Path) -> RunTree:
    """RL from the adapter to step 20, and a resume to step 25, with half of the example's prompts a step."""
    flags = [RL_TOML, "--output_dir", str(outputs), "--run.init_adapter_path", str(outputs / "sft/adapter")]
    flags += ["--run.sampling.prompts_per_step", "32"]
    said = graftwork("rl", *flags)
    assert said.index("start: the run starts as the same function as the source's") < said.index("training from")
    tree = RunTree.at(outputs / "run_reverse")
    assert stable_steps(tree.checkpoints) == [0, 10, 20]
    graftwork("rl", *flags, "--resume", "--max-steps", "25")
    assert "no trainer is running" in graftwork("runs", "--output-dir", str(outputs))
    return tree


def log_probs(batch: Batch, adapter: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(trainer's, sampler's) log-probs of a batch's sampled tokens, under an adapter or the bare base."""
    base = load_base(BASE, LoraConfig())
    bank = base.new_bank(1, gradients=False)
    segments: tuple[Segment, ...] = ()
    examples = [Example(r.token_ids, r.loss_mask, r.logprobs, r.advantage) for r in batch.rollouts]
    micro = whole(examples)
    if adapter is not None:
        bank.write(0, PreparedInitAdapter(read_peft(adapter).adapter, 16, 32.0, "", {}))
        segments = (Segment(0, 0, len(micro.tokens), 2.0),)
    with torch.no_grad():
        hidden = base.hidden(micro.tokens, micro.positions, micro.plan, Route(bank, segments))[micro.loss_rows]
        ours, _ = token_logprobs(hidden, base.head, micro.targets, temperature=1.0, chunk=2048)
    return ours, micro.sampler_logprobs


def assert_first_rollouts_come_from(tree: RunTree, source: Path) -> None:
    """Step_0 is the source adapter; batch 1 was sampled from it: by name, by digest and by its log-probs."""
    digest = read_peft(source).adapter.digest()
    published, found = read_version(tree, 0), read_batch(tree, 1)
    assert published is not None and found is not None
    batch = found[0]
    assert published.version.digest == digest and not (published.path / "probe.json").exists()
    assert json.loads((published.path / "report.json").read_text())["source_digest"] == digest
    assert [(v.name, v.digest, v.digest_source) for v in batch.versions] == [(published.version.name, digest, "engine")]
    assert {row["digest"] for row in read_lines(tree.samples_jsonl) if row["step"] == 1} == {digest}
    ours, sampled = log_probs(batch, published.path)
    assert (ours - sampled).abs().max() < 1e-4
    bare, _ = log_probs(batch, None)
    assert (bare - sampled).abs().mean() > 0.5  # the same check fails for the bare base


def test_the_reward_rises_through_a_checkpoint_and_a_resume(story: RunTree) -> None:
    rows = read_lines(story.metrics_jsonl)
    assert [row["step"] for row in rows] == list(range(1, 26))
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.65 < min(np.mean(rewards[15:20]), np.mean(rewards[20:]))
    assert max(row["mismatch_max"] for row in rows) < 1e-4
    status = read_status(story)
    assert status is not None and (status.state, status.start_step, status.step) == ("finished", 20, 25)
    for step in stable_steps(story.checkpoints):
        verify(story.checkpoint(step), "checkpoint")
    assert {row["step"] for row in read_lines(story.samples_jsonl)} == set(range(1, 26))
    for name in ("reward.png", "loss.png"):
        assert (story.root / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_rollouts_come_from_the_source_adapter_and_not_from_the_bare_base(
    story: RunTree, outputs: Path
) -> None:
    assert_first_rollouts_come_from(story, outputs / "sft" / "adapter")


@pytest.mark.slow  # tests/integration/test_story_tenants.py has runs of other ranks in every run of the tests
def test_an_adapter_of_another_rank_and_alpha_reaches_the_same_reward(outputs: Path, tmp_path: Path) -> None:
    """Rank 16, alpha 32 into a run of rank 24, alpha 36: padded, rescaled, the same function; then RL as usual."""
    source = outputs / "sft" / "adapter"
    flags = ["--run.init_adapter_path", str(source), "--run.adapter.rank", "24", "--run.adapter.alpha", "36"]
    graftwork("rl", RL_TOML, "--output_dir", str(tmp_path), "--lora.max_rank", "24", *flags)
    tree = RunTree.at(tmp_path / "run_reverse")
    said = (tmp_path / "logs" / "orchestrator.log").read_text()
    assert "padded to the run's rank: exact" in said and "the same function as the source's" in said
    step_0 = str(tree.checkpoint(0))
    same = json.loads(graftwork("adapter", "diff", str(source), step_0, "--base", BASE.path, "--json").splitlines()[0])
    assert same["same"] and same["relative_difference"] < 1e-5
    rewards = [row["reward"] for row in read_lines(tree.metrics_jsonl)]
    assert rewards[0] < 0.65 < np.mean(rewards[15:20])
    assert max(row["mismatch_max"] for row in read_lines(tree.metrics_jsonl)) < 1e-4


def test_every_batch_was_sampled_from_the_version_before_it(story: RunTree) -> None:
    for step in range(1, 26):
        found, published = read_batch(story, step), read_version(story, step - 1)
        assert found is not None and published is not None
        assert [version.digest for version in found[0].versions] == [published.version.digest]


def test_a_second_rl_on_the_run_is_refused_without_resume(story: RunTree) -> None:
    before = sorted(p for p in story.root.rglob("*") if p.is_file())
    said = graftwork("rl", RL_TOML, "--output_dir", str(story.root.parent), expect=1)
    assert "--resume" in said and "Traceback" not in said
    assert sorted(p for p in story.root.rglob("*") if p.is_file()) == before


@pytest.mark.slow  # tests/integration/test_trainer.py has the door in one process
def test_the_trainers_door_through_the_command_line(outputs: Path, tmp_path: Path) -> None:
    """3 steps, a checkpoint, a resume to 5; the adapter comes in through the trainer's init_adapter_path."""
    source = outputs / "sft" / "adapter"
    flags = [
        RL_TOML, "--output_dir", str(tmp_path), "--run.id", "door", "--run.init_adapter_path", "null",
        "--trainer.init_adapter_path", str(source), "--trainer.slots", "2", "--run.checkpoint_interval_steps", "2",
        "--run.sampling.prompts_per_step", "8", "--run.sampling.samples_per_prompt", "4",
    ]  # fmt: skip
    graftwork("rl", *flags, "--max-steps", "3")
    tree = RunTree.at(tmp_path / "run_door")
    assert_first_rollouts_come_from(tree, source)
    assert stable_steps(tree.checkpoints) == [0, 2, 3]
    graftwork("rl", *flags, "--resume", "--max-steps", "5")
    assert [row["step"] for row in read_lines(tree.metrics_jsonl)] == [1, 2, 3, 4, 5]


def test_an_adapter_converted_by_hand_starts_a_trainer_that_was_told_of_none(outputs: Path, tmp_path: Path) -> None:
    source, tree = outputs / "sft" / "adapter", RunTree.at(tmp_path / "run_x")
    graftwork("convert", str(source), str(tree.root))
    names = {p.relative_to(tree.checkpoint(0)).as_posix() for p in tree.checkpoint(0).rglob("*") if p.is_file()}
    weight = {f"weight/{name}" for name in ("STABLE", "adapter_config.json", "adapter_model.safetensors")}
    assert names >= {"STABLE", "trainer/rank_0.safetensors", *weight}
    Disk().publish_file(tree.orch_toml, dump(RunConfig(model=BASE)))
    config = tmp_path / "trainer.toml"
    config.write_text(f'output_dir = "{tmp_path}"\n[model]\npath = "{BASE.path}"\ndtype = "float32"\ndevice = "cpu"\n')
    trainer = subprocess.Popen([sys.executable, "-m", "graftwork", "trainer", str(config)], cwd=REPOSITORY)
    try:
        end = time.monotonic() + 120
        while read_version(tree, 0) is None and trainer.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        published = read_version(tree, 0)
        assert published is not None and published.version.digest == read_peft(source).adapter.digest()
    finally:
        os.kill(trainer.pid, signal.SIGTERM)
    assert trainer.wait(timeout=60) == 0


def test_sft_goes_on_from_an_adapter_converted_by_hand(outputs: Path, tmp_path: Path) -> None:
    graftwork("convert", str(outputs / "sft" / "adapter"), str(tmp_path / "more"))
    graftwork("sft", SFT_TOML, "--output_dir", str(tmp_path / "more"), "--resume", "--max-steps", "2")
    first = read_lines(tmp_path / "more" / "metrics.jsonl")[0]
    fresh, last = (read_lines(outputs / "sft" / "metrics.jsonl")[i] for i in (0, -1))
    assert first["step"] == 1 and first["loss"] < (fresh["loss"] + last["loss"]) / 2


def test_sft_resumed_is_bit_equal_to_sft_without_a_stop(tmp_path: Path) -> None:
    config = load(SftConfig, REPOSITORY / SFT_TOML).model_copy(
        update={"model": BASE, "batch_size": 8, "max_steps": 6, "checkpoint_interval_steps": 3}
    )
    for folder, steps, resume in (("whole", 6, False), ("parts", 3, False), ("parts", 6, True)):
        sft.main(config.model_copy(update={"output_dir": str(tmp_path / folder), "max_steps": steps, "resume": resume}))
    for name in ("checkpoints/step_6/trainer/rank_0.safetensors", "checkpoints/step_6/trainer/state.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    digests = [read_peft(tmp_path / folder / "adapter").adapter.digest() for folder in ("whole", "parts")]
    assert digests[0] == digests[1]
