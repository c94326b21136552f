"""Batches of real verifiers environments, played at the embedded server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE
from transformers import AutoModelForCausalLM

from graftwork.config.run import EnvironmentConfig, SamplingConfig
from graftwork.errors import ConfigError, InferenceError, Refused, RunError, ServerGone
from graftwork.inference.local import LocalSampler
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.collect import Collected, Request, Source, collect, evaluate
from graftwork.rollouts.verifiers import environment_of
from graftwork.store.queue import Rollout

SAMPLING = SamplingConfig(prompts_per_step=4, samples_per_prompt=3, max_tokens=9, temperature=1.25)
NAME = str(BASE)


def environment(kind: str = "branch", name: str = "verifiers:odd_game", options: Any = None, **limits: Any) -> Any:
    taskset = {"kind": kind} if name.endswith("odd_game") else {}
    options = {"taskset": taskset, "heldout_tasks": 2, **(options or {})}
    return environment_of(EnvironmentConfig(name=name, options=options, **limits))


def play(
    url: str, played: Any, step: int = 1, sampling: SamplingConfig = SAMPLING, source: Source | None = None
) -> Collected:
    async def run() -> Collected:
        async with InferenceClient(url, 60) as client:
            request = Request.of_batch("tiny", 5, step, sampling)
            return await collect(played, ChatTokenizer.load(BASE), client, source or Source(NAME), request)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def expected_logprobs(model: Any, rollout: Rollout) -> Any:
    """transformers' own log-probs of a rollout's loss tokens, at the sampling temperature."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].float() / SAMPLING.temperature
    rows = torch.from_numpy(np.flatnonzero(rollout.loss_mask))
    return torch.log_softmax(logits, -1)[rows - 1, ids[rows]].numpy()


# --- what is trained on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("reverse_game", ""), ("odd_game", "branch"), ("odd_game", "tool")])
def test_loss_lies_on_the_models_own_tokens_with_the_log_probs_that_it_gave(
    server: str, model: Any, name: str, kind: str
) -> None:
    """A token that was not sampled, or one at another place, would have another log-prob."""
    collected = play(server, environment(kind, f"verifiers:{name}"))
    assert collected.failed == 0
    tokenizer = ChatTokenizer.load(BASE)
    for rollout in collected.rollouts:
        found = rollout.logprobs[rollout.loss_mask]
        np.testing.assert_allclose(found, expected_logprobs(model, rollout), atol=2e-5)
        text = tokenizer.decode(rollout.token_ids, skip_special_tokens=False)
        assert text.startswith("<|user|>") and not rollout.loss_mask[0]
    assert len(collected.rows) == 12
    turns = [len([m for m in row.get("turns", []) if m["role"] == "assistant"]) for row in collected.rows]
    assert max(turns) > 1


def test_a_branch_shares_its_beginning_and_no_loss(server: str) -> None:
    collected = play(server, environment("branch"))
    by_sample: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in collected.rollouts:
        by_sample.setdefault((rollout.prompt_index, rollout.sample_index), []).append(rollout)
    assert len(by_sample) == 12
    tokenizer = ChatTokenizer.load(BASE)
    for left, right in by_sample.values():
        shared = len(tokenizer.encode(tokenizer.decode(left.token_ids, False).partition("<|user|>copy: left")[0]))
        assert left.token_ids[:shared].tolist() == right.token_ids[:shared].tolist()
        assert left.loss_mask[:shared].any() and not right.loss_mask[:shared].any()
        assert right.loss_mask[shared:].any()
        assert (left.reward, left.advantage) == (right.reward, right.advantage)


def test_a_rollout_with_more_branches_than_are_allowed_has_failed(server: str) -> None:
    with pytest.raises(RunError, match=r"the conversation has 2 branches, environment\.max_branches is 1"):
        play(server, environment("branch", max_branches=1))


def test_advantages_are_centred_over_the_samples_of_a_prompt(server: str) -> None:
    collected = play(server, environment("branch"))
    for prompt in range(4):
        rows = [row for row in collected.rows if row["prompt_index"] == prompt]
        mean = sum(row["reward"] for row in rows) / 3
        assert [row["advantage"] for row in rows] == pytest.approx([row["reward"] - mean for row in rows], abs=1e-5)


def test_the_same_seed_asks_for_the_same_tasks_and_the_same_draws(server: str) -> None:
    one, again, other = (play(server, environment("tool"), step) for step in (1, 1, 2))
    assert [row["prompt"] for row in one.rows] == [row["prompt"] for row in again.rows]
    assert {row["prompt"] for row in one.rows}.isdisjoint(row["prompt"] for row in other.rows)
    assert [r.token_ids.tolist() for r in one.rollouts] == [r.token_ids.tolist() for r in again.rollouts]


def test_answers_that_are_cut_say_so(server: str) -> None:
    collected = play(server, environment("tool"), sampling=SAMPLING.model_copy(update={"max_tokens": 2}))
    end = ChatTokenizer.load(BASE).eos_token_ids[0]
    for row, rollout in zip(collected.rows, collected.rollouts, strict=True):
        assert row["finish_reason"] == ("stop" if rollout.token_ids[-1] == end else "length")
        assert rollout.loss_mask.sum() <= 4, "two turns of two tokens each, at most"
    assert "length" in {row["finish_reason"] for row in collected.rows}


# --- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fail", "the puzzle is missing"),
        ("slow", "it took longer than environment.timeout_seconds allows"),
        ("long", "exceeds maximum context length"),
    ],
)
def test_a_rollout_that_fails_is_data(server: str, kind: str, words: str) -> None:
    collected = play(server, environment(kind, timeout_seconds=20.0 if kind == "slow" else None))
    good = {row["prompt_index"] for row in collected.rows if "error" not in row}
    errors = [row["error"] for row in collected.rows if "error" in row]
    assert 0 < len(good) < 4 and collected.failed == len(errors) == 12 - 3 * len(good)
    assert all(words in error for error in errors), errors[0]
    assert {rollout.prompt_index for rollout in collected.rollouts} == good


def test_at_most_so_many_rollouts_at_a_time(server: str) -> None:
    played = environment("tool", max_concurrent=2)
    live, most, run_slot = 0, 0, played._env.run_slot

    async def counted(*arguments: Any) -> Any:
        nonlocal live, most
        live += 1
        most = max(most, live)
        try:
            return await run_slot(*arguments)
        finally:
            live -= 1

    played._env.run_slot = counted
    assert play(server, played).failed == 0
    assert most == 2


def test_what_is_no_fault_of_the_environments_ends_the_batch(server: str) -> None:
    with pytest.raises(Refused, match="not loaded"):
        play(server, environment(), source=Source("other"))
    with pytest.raises(ServerGone):
        play("http://127.0.0.1:9", environment())
    with pytest.raises(RunError, match="2 rollouts of agents that train"):
        play(server, environment("tool", options={"both": True}))
    with pytest.raises(RunError, match="leave model and sampling of the agent that trains to the run"):
        play(server, environment("tool", options={"agent": {"sampling": {"temperature": 0.5}}}))


# --- who answers ----------------------------------------------------------------------------------------------------


def test_the_engine_vouches_for_every_answer_of_an_adapter(server: str, tmp_path: Path) -> None:
    published = publish(tmp_path)
    source = Source(published.version.name, published.version.digest)

    async def load() -> None:
        async with InferenceClient(server, 60) as client:
            await client.load_adapter(published.version, published.path)

    asyncio.run(load())
    collected = play(server, environment("tool"), source=source)
    assert collected.digest_source == "engine"
    assert {(row["version"], row["digest"]) for row in collected.rows} == {(source.model, source.digest)}
    with pytest.raises(InferenceError, match=r"has digest .*, published was 0000"):
        play(server, environment("tool"), source=replace(source, digest="0" * 64))
    assert play(server, environment("tool")).digest_source == "claimed", "the base has no digest"


def publish(folder: Path) -> Any:
    """A published adapter for the example's base: random, small."""
    from support import random_adapter

    from graftwork.adapters.formats.peft_write import write_peft
    from graftwork.adapters.source import AdapterFacts
    from graftwork.config.section import LoraConfig, ModelConfig
    from graftwork.model.base import load_base
    from graftwork.store.disk import Disk
    from graftwork.store.layout import RunId, RunTree
    from graftwork.store.queue import Version, publish_version

    base = load_base(ModelConfig(path=str(BASE), dtype="float32", device="cpu"), LoraConfig())
    adapter = random_adapter(base.spec.shapes, 4)
    tree = RunTree(RunId("r"), folder / "run_r")
    version = Version(tree.id, 0, adapter.digest())
    return publish_version(Disk(), tree, version, write_peft(adapter, AdapterFacts()), {})


# --- settings and evaluation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("verifiers:nowhere_to_be_found", {}, "nowhere_to_be_found"),
        ("verifiers:odd_game", {"bot": True}, "bot"),
        ("verifiers:odd_game", {"taskset": {"kinds": "x"}}, "kinds"),
        ("verifiers:odd_game", {"renderer": {"name": "no such"}}, "renderer"),
        ("verifiers:odd_game", {"heldout_tasks": -1}, "heldout_tasks = -1"),
        ("verifiers:odd_game", {"heldout_tasks": 12}, "none is left to train on"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why(name: str, options: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        environment_of(EnvironmentConfig(name=name, options=options))
    assert (words in str(caught.value) and name in str(caught.value)) or words in str(caught.value)


def test_evaluation_plays_the_held_out_tasks(server: str) -> None:
    async def run() -> Any:
        async with InferenceClient(server, 60) as client:
            return await evaluate(
                environment("tool"),
                ChatTokenizer.load(BASE),
                client,
                Source(NAME),
                n_prompts=3,
                seed=1,
                sampling=SAMPLING,
            )

    found = asyncio.run(run())
    assert [row["prompt"] for row in found.rows] == ["copy: word10", "copy: word11", "copy: word10"]
    assert found.mean_reward == pytest.approx(sum(row["reward"] for row in found.rows) / 3)


def test_there_must_be_a_server() -> None:
    request = Request.of_batch("tiny", 5, 1, SAMPLING)
    sampler = LocalSampler(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="samples at a server"):
        asyncio.run(collect(environment(), ChatTokenizer.load(BASE), sampler, Source(NAME), request))
