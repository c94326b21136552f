"""Waves and collection: order, seeds, tokens in and tokens out, failed rollouts, proof of the source."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from test_rollouts_chat import CHATML, make_base

from graftwork.config.run import SamplingConfig
from graftwork.errors import ConfigError, InferenceError, RunError, ServerGone
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Played, Request, Source, collect, evaluate, outcome
from graftwork.rollouts.environment import Answer, Task
from graftwork.rollouts.reverse_text import ReverseText
from graftwork.rollouts.rounds import choose
from graftwork.rollouts.sampling import Completion
from graftwork.rollouts.traces import Learnt, TracedTalk
from graftwork.rollouts.wave import Call, plan, request_seed

SOURCE = Source("tiny@3-abababab", "ab" * 32)
SAMPLING = SamplingConfig(prompts_per_step=3, samples_per_prompt=4, max_tokens=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatTokenizer.load(make_base(tmp_path_factory.mktemp("base"), CHATML))


class FakeSampler:
    """Letters that are a function of (model, prompt, seed, index); some answers end, some are cut."""

    def __init__(self, name=SOURCE.model, digest=SOURCE.digest, fail_at=None):
        self.name, self.digest, self.fail_at = name, digest, fail_at
        self.requests = []

    async def complete(self, model, prompts, n, sampling, seed):
        self.requests.append((model, [tuple(p) for p in prompts], n, seed))
        if len(self.requests) == self.fail_at:
            raise ServerGone("the server is gone")
        return [self.one(tuple(p), seed, i * n + s, sampling) for i, p in enumerate(prompts) for s in range(n)]

    def one(self, prompt, seed, index, sampling):
        rng = random.Random(f"{prompt} {seed} {index}")
        token_ids = [rng.randrange(70, 95) for _ in range(rng.randrange(1, sampling.max_tokens))]
        ended = rng.random() < 0.7
        token_ids += [1] if ended else []
        logprobs = tuple(-rng.random() for _ in token_ids)
        return Completion(tuple(token_ids), logprobs, "stop" if ended else "length", self.name, self.digest)


class Talk:
    """Asks once more for every even letter; answers come at random times."""

    def __init__(self, turns=3, raise_at=()):
        self.turns, self.raise_at, self.played = turns, raise_at, 0

    def task(self, seed, index, split):
        return Task(({"role": "user", "content": f"{split} {index}"},))

    async def run(self, task, policy):
        number, self.played = self.played, self.played + 1
        if number in self.raise_at:
            raise RuntimeError(f"rollout {number} broke")
        answer = await policy.ask(task.messages)
        for turn in range(number % self.turns):
            await asyncio.sleep(random.random() * 0.003)
            answer = await policy.ask([{"role": "user", "content": f"turn {turn}: {answer.text}"}])
        return len(answer.text) / 10


def play(environment, tokenizer, sampler=None, sampling=SAMPLING, source=SOURCE, step=2):
    sampler = sampler or FakeSampler()
    return asyncio.run(collect(environment, tokenizer, sampler, source, Request.of_batch("tiny", 5, step, sampling)))


# --- waves ----------------------------------------------------------------------------------------------------------


def test_plan_sends_whole_equal_groups_once_and_the_rest_one_by_one():
    calls = [Call(p, s, (p,)) for p in (2, 0) for s in (1, 0)] + [Call(1, 0, (1,)), Call(1, 1, (9,)), Call(3, 1, (3,))]
    group, single = plan(calls, 2)
    assert (group.kind, group.n, group.prompts) == ("group", 2, [(0,), (2,)])
    assert [(c.prompt_index, c.sample_index) for c in group.calls] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert (single.kind, single.n, single.prompts) == ("single", 1, [(1,), (9,), (3,)])


def test_seeds_are_63_bits_stable_and_apart():
    seeds = [request_seed(key, wave, kind) for key in "ab" for wave in (0, 1) for kind in ("group", "single")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    expected = int.from_bytes(hashlib.sha256(b"a wave 0 group").digest()[:8], "big") >> 1
    assert seeds[0] == expected


def test_a_single_turn_batch_is_one_request_that_reads_every_prompt_once(tokenizer):
    sampler = FakeSampler()
    collected = play(ReverseText(), tokenizer, sampler)
    ((model, prompts, n, _),) = sampler.requests
    assert (model, len(prompts), n, collected.waves) == (SOURCE.model, 3, 4, 1)
    order = [(r.prompt_index, r.sample_index) for r in collected.rollouts]
    assert order == [(p, s) for p in range(3) for s in range(4)]


def test_the_engine_sees_the_same_requests_whatever_the_timing(tokenizer):
    first, second = FakeSampler(), FakeSampler()
    one, two = play(Talk(), tokenizer, first), play(Talk(), tokenizer, second)
    assert first.requests == second.requests
    assert one.waves == 3
    assert one.rows == two.rows
    for a, b in zip(one.rollouts, two.rollouts, strict=True):
        assert a.token_ids.tobytes() == b.token_ids.tobytes()
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_a_rollout_that_gives_up_waiting_holds_nobody_up(tokenizer):
    class Impatient(Talk):
        async def run(self, task, policy):
            number, self.played = self.played, self.played + 1
            if number == 0:
                async with asyncio.timeout(0.01):
                    await policy.ask(task.messages)
            elif number == 1:
                await asyncio.sleep(0.05)
            return float(len((await policy.ask(task.messages)).text))

    collected = play(Impatient(), tokenizer)
    assert collected.failed == 1
    assert "TimeoutError" in collected.rows[0]["error"]


# --- rollouts -------------------------------------------------------------------------------------------------------


def test_tokens_stay_as_they_were_sampled(tokenizer):
    sampler = FakeSampler()
    collected = play(Talk(), tokenizer, sampler)
    for rollout, row in zip(collected.rollouts, collected.rows, strict=True):
        text = tokenizer.decode(rollout.token_ids, skip_special_tokens=False)
        expected = row.get("turns") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        # The template closes the last answer with an end token and a line break; the sampler may have been cut before.
        assert tokenizer.render(expected, False).removesuffix("\n").removesuffix("<|im_end|>") == text.removesuffix(
            "<|im_end|>"
        )
        mask = rollout.loss_mask
        assert (rollout.logprobs[mask] < 0).all()
        assert not rollout.logprobs[~mask].any()
        assert (rollout.version_index == np.where(mask, 0, -1)).all()
        assert not mask[0]
        answers = "".join(m["content"] for m in expected if m["role"] == "assistant")
        assert tokenizer.decode(rollout.token_ids[mask]) == answers


def test_each_sample_reads_what_it_was_asked_itself(tokenizer):
    """The samples of a prompt share its tokens while they are asked the same, and no longer."""

    asked = {"role": "user", "content": ""}

    class Moody(Talk):
        async def run(self, task, policy):
            number, self.played = self.played, self.played + 1
            asked["content"] = f"in mood {number // 2}"
            await policy.ask([asked])
            return 1.0

    collected = play(Moody(), tokenizer)
    told = [tokenizer.decode(rollout.token_ids[~rollout.loss_mask]) for rollout in collected.rollouts]
    assert all(f"in mood {number // 2}" in text for number, text in enumerate(told))


def test_every_step_has_its_own_tasks_and_rows_tell_them(tokenizer):
    one, two = play(ReverseText(), tokenizer, step=1), play(ReverseText(), tokenizer, step=2)
    words = {row["prompt"] for row in one.rows + two.rows}
    assert len(words) == 6
    row = one.rows[5]
    assert row["prompt"] == ReverseText().task(5, 1, "train").messages[0]["content"]
    rollout = one.rollouts[5]
    assert (row["step"], row["prompt_index"], row["sample_index"]) == (1, 1, 1)
    assert row["reward"] == pytest.approx(rollout.reward)
    assert row["advantage"] == rollout.advantage
    assert (row["version"], row["digest"], row["digest_source"]) == (SOURCE.model, SOURCE.digest, "engine")
    assert "turns" not in row


def test_a_failed_rollout_is_data(tokenizer):
    collected = play(Talk(turns=1, raise_at=(1, 4, 5, 6, 7)), tokenizer)
    assert collected.failed == 5
    assert [(r.prompt_index, r.sample_index) for r in collected.rollouts] == [
        (0, 0), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3),
    ]  # fmt: skip
    assert sum(r.advantage for r in collected.rollouts if r.prompt_index == 0) == pytest.approx(0, abs=1e-6)
    row = collected.rows[1]
    assert (row["reward"], row["advantage"], row["error"]) == (None, 0.0, "RuntimeError: rollout 1 broke")


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e300, 10**40, None, "1"])
def test_a_reward_that_is_no_number_fails_its_rollout(tokenizer, reward):
    class Odd(Talk):
        async def run(self, task, policy):
            first = self.played == 0
            good = await super().run(task, policy)
            return reward if first else good

    collected = play(Odd(turns=1), tokenizer)
    assert collected.failed >= 1
    assert "not a finite number" in collected.rows[0]["error"]


def test_a_rollout_that_asks_nothing_or_two_things_at_once_fails(tokenizer):
    class Rude(Talk):
        async def run(self, task, policy):
            number, self.played = self.played, self.played + 1
            if number == 0:
                return 1.0
            if number == 1:
                await asyncio.gather(policy.ask(task.messages), policy.ask(task.messages))
            return float(len((await policy.ask(task.messages)).text))

    collected = play(Rude(), tokenizer)
    assert "asked nothing" in collected.rows[0]["error"]
    assert "one question at a time" in collected.rows[1]["error"]


def test_a_slow_environment_fails_its_rollout_and_holds_nobody_up(tokenizer):
    class Slow(Talk):
        async def run(self, task, policy):
            number, self.played = self.played, self.played + 1
            if number == 0:
                await asyncio.sleep(60)
            answer = await policy.ask(task.messages)
            if number == 1:
                await asyncio.sleep(60)
            return len((await policy.ask(task.messages)).text) + len(answer.text) / 10

    request = replace(Request.of_batch("tiny", 5, 2, SAMPLING), timeout_seconds=0.2)
    collected = asyncio.run(collect(Slow(), tokenizer, FakeSampler(), SOURCE, request))
    assert [row.get("error") for row in collected.rows] == [
        "it took longer than environment.timeout_seconds allows"
    ] * 2 + [None] * 10, "those that waited for the two, longer than 0.2 s, have not used up their time"
    assert collected.waves == 2


def test_the_time_limit_goes_on_after_an_answer(tokenizer):
    class Dawdling(Talk):
        async def run(self, task, policy):
            number, self.played = self.played, self.played + 1
            for _ in range(4):
                await policy.ask(task.messages)
                await asyncio.sleep(0.2 if number == 0 else 0)
            return 1.0 + number

    request = replace(Request.of_batch("tiny", 5, 2, SAMPLING), timeout_seconds=0.5)
    collected = asyncio.run(collect(Dawdling(), tokenizer, FakeSampler(), SOURCE, request))
    assert [i for i, row in enumerate(collected.rows) if "error" in row] == [0], "four times 0.2 s is too much"


def test_an_environment_that_plays_by_itself(tokenizer):
    class Branching:
        async def play(self, tokenizer, sampler, source, request):
            def talk(p, s):
                mask = np.array([False, True, False, True])
                ids, logprobs = np.arange(4, dtype=np.int32), np.where(mask, -0.5, 0).astype(np.float32)
                one = Learnt(ids, mask, logprobs)
                answer = Answer(f"{p} {s}", (1, 3), "stop")
                said = ({"role": "user", "content": "go"}, {"role": "assistant", "content": answer.text})
                return TracedTalk(p, s, said, (answer,), (one,) * (1 + s % 2))

            played = [outcome(talk(p, s), float(s == 3)) for p in range(3) for s in range(4)]
            played[2] = Played(TracedTalk(0, 2), math.nan, "it broke")
            return played, "claimed"

    collected = play(Branching(), tokenizer)
    order = [(r.prompt_index, r.sample_index) for r in collected.rollouts]
    assert order[:5] == [(0, 0), (0, 1), (0, 1), (0, 3), (0, 3)] and len(order) == 17
    assert (collected.failed, len(collected.rows), collected.digest_source) == (1, 12, "claimed")
    told = choose([collected], SamplingConfig(prompts_per_step=3, samples_per_prompt=4)).sampled
    assert (told.answers, told.reward_mean) == (11, pytest.approx(3 / 11)), "a sample's reward counts once"
    advantages = {(r.prompt_index, r.sample_index): r.advantage for r in collected.rollouts}
    assert advantages[0, 3] == pytest.approx(2 / 3) and advantages[1, 3] == 0.75, "of the samples, not of the branches"
    assert collected.rows[2]["error"] == "it broke" and collected.rows[3]["answer"] == "0 3"


def test_a_batch_of_failures_ends_the_run(tokenizer):
    with pytest.raises(RunError, match=r"run tiny: all 12 rollouts of step 2 failed.*rollout 0 broke"):
        play(Talk(raise_at=range(12)), tokenizer)


def test_a_fault_of_the_sampler_ends_the_batch_even_if_the_environment_looks_away(tokenizer):
    class Careless(Talk):
        async def run(self, task, policy):
            try:
                return await super().run(task, policy)
            except ServerGone:
                return 1.0

    with pytest.raises(ServerGone):
        play(Careless(), tokenizer, FakeSampler(fail_at=2))


def test_an_environment_may_end_the_run(tokenizer):
    class Strict(Talk):
        def task(self, seed, index, split):
            raise ConfigError("the data set is missing")

    with pytest.raises(ConfigError, match="data set"):
        play(Strict(), tokenizer)


# --- whose answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digest", "words"),
    [("base", None, ["answered by base"]), (SOURCE.model, "cd" * 32, ["cdcd", "abab", "Restart"])],
)
def test_nothing_is_sampled_from_another_adapter(tokenizer, name, digest, words):
    with pytest.raises(InferenceError) as caught:
        play(ReverseText(), tokenizer, FakeSampler(name, digest))
    assert all(word in str(caught.value) for word in words)


def test_a_server_that_cannot_tell_digests_only_claims(tokenizer):
    collected = play(ReverseText(), tokenizer, FakeSampler(digest=None))
    assert collected.digest_source == "claimed"
    assert collected.rows[0]["digest"] == SOURCE.digest


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_plays_held_out_tasks(tokenizer):
    async def run(seed):
        sampler = FakeSampler("base", None)
        return await evaluate(
            ReverseText(), tokenizer, sampler, Source("base"), n_prompts=10, seed=seed, sampling=SAMPLING
        )

    one, again, other = (asyncio.run(run(seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.rows) == 10
    assert one.mean_reward == pytest.approx(sum(row["reward"] for row in one.rows) / 10)
    heldout = {ReverseText().task(1, i, "heldout").messages[0]["content"] for i in range(10)}
    assert {row["prompt"] for row in one.rows} == heldout
    assert one.failed == 0
