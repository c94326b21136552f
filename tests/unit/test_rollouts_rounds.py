"""Groups that teach nothing are left out of a batch, and others sampled in their place, the same way every time."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollouts_chat import CHATML, make_base
from test_rollouts_collect import SOURCE, FakeSampler

from graftwork.config.run import SamplingConfig
from graftwork.errors import RunError
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Request
from graftwork.rollouts.environment import Task
from graftwork.rollouts.rounds import gather

STEP, PROMPTS = 3, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatTokenizer.load(make_base(tmp_path_factory.mktemp("base"), CHATML))


class Scripted:
    """Task i of the step earns rewards[i], one a sample; None breaks. Tasks beyond those earn 0, 1, 2, ..."""

    def __init__(self, rewards, rounds):
        self.rewards, self.first, self.played = rewards, (STEP - 1) * PROMPTS * rounds, Counter()

    def task(self, seed, index, split):
        return Task(({"role": "user", "content": f"task {index}"},), {"index": index - self.first})

    async def run(self, task, policy):
        index = task.data["index"]
        sample, self.played[index] = self.played[index], self.played[index] + 1
        await policy.ask(task.messages)
        reward = self.rewards[index][sample] if index < len(self.rewards) else float(sample)
        if reward is None:
            raise RuntimeError(f"{index}.{sample} broke")
        return reward


def play(tokenizer, rewards, *, sampler=None, **changes):
    samples = len(rewards[0])
    sampling = SamplingConfig(prompts_per_step=PROMPTS, samples_per_prompt=samples, max_tokens=6, **changes)
    environment = Scripted(rewards, sampling.max_rounds)
    sampler = sampler or FakeSampler()
    return asyncio.run(gather(environment, tokenizer, sampler, SOURCE, "tiny", 5, STEP, sampling))


def prompts_of(gathered):
    return sorted({rollout.prompt_index for rollout in gathered.rollouts})


def test_equal_groups_are_left_out_and_their_rewards_still_count(tokenizer):
    gathered = play(tokenizer, [[1, 1], [0, 1], [0.5, 0.5]])
    assert prompts_of(gathered) == [1]
    assert [row.get("left_out", False) for row in gathered.rows] == [True, True, False, False, True, True]
    told = gathered.sampled
    assert (told.rounds, told.answers, told.failed, told.equal_groups, told.left_out_groups) == (1, 6, 0, 2, 2)
    assert told.reward_mean == pytest.approx(4 / 6)
    assert told.reward_std == pytest.approx(np.std([1, 1, 0, 1, 0.5, 0.5]))
    kept = sum(int(rollout.loss_mask.sum()) for rollout in gathered.rollouts)
    everything = play(tokenizer, [[1, 1], [0, 1], [0.5, 0.5]], skip_equal_groups=False)
    assert told.answer_tokens == sum(int(r.loss_mask.sum()) for r in everything.rollouts) > kept > 0


def test_they_stay_where_they_are_wanted(tokenizer):
    gathered = play(tokenizer, [[1, 1], [0, 1], [0.5, 0.5]], skip_equal_groups=False)
    assert prompts_of(gathered) == [0, 1, 2]
    assert (gathered.sampled.equal_groups, gathered.sampled.left_out_groups) == (2, 0)
    assert not any("left_out" in row for row in gathered.rows)


def test_a_later_round_plays_other_tasks_with_other_seeds_and_no_more_than_are_missing(tokenizer):
    sampler = FakeSampler()
    gathered = play(tokenizer, [[1, 1], [0, 1], [1, 1], [2, 2], [0, 1]], sampler=sampler, max_rounds=3)
    assert [len(prompts) for _, prompts, _, _ in sampler.requests] == [3, 2, 1]
    assert len({seed for *_, seed in sampler.requests}) == 3
    assert len({prompt for _, prompts, _, _ in sampler.requests for prompt in prompts}) == 6
    assert prompts_of(gathered) == [1, 4, 6]
    assert [row["prompt_index"] for row in gathered.rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 6, 6]
    told = gathered.sampled
    assert (told.rounds, told.answers, told.equal_groups, told.left_out_groups) == (3, 12, 3, 3)


def test_a_full_batch_asks_for_no_other_round_and_its_first_round_is_that_of_one_round(tokenizer):
    many, one = FakeSampler(), FakeSampler()
    play(tokenizer, [[0, 1], [0, 1], [0, 1]], sampler=many, max_rounds=4)
    play(tokenizer, [[0, 1], [0, 1], [0, 1]], sampler=one)
    assert len(many.requests) == len(one.requests) == 1
    assert many.requests[0][3] == one.requests[0][3], "the seed of round 0 does not depend on max_rounds"


def test_where_every_group_is_equal_the_first_round_is_kept(tokenizer):
    gathered = play(tokenizer, [[1, 1], [0, 0], [1, 1], [1, 1], [1, 1], [1, 1]], max_rounds=2)
    assert prompts_of(gathered) == [0, 1, 2] and gathered.nothing_to_learn
    assert (gathered.sampled.equal_groups, gathered.sampled.left_out_groups) == (6, 3)
    assert [row["prompt_index"] for row in gathered.rows if row.get("left_out")] == [3, 3, 4, 4, 5, 5]


def test_one_survivor_is_an_equal_group_and_a_later_round_may_fail_whole(tokenizer):
    gathered = play(tokenizer, [[1, None], [0, 1], [0, 1], [None, None]], max_rounds=2)
    assert prompts_of(gathered) == [1, 2]
    told = gathered.sampled
    assert (told.rounds, told.answers, told.failed, told.equal_groups, told.left_out_groups) == (2, 5, 3, 1, 1)
    with pytest.raises(RunError, match="all 6 rollouts of step 3 failed"):
        play(tokenizer, [[None, None]] * 3, max_rounds=2)


def test_the_tasks_of_all_steps_and_rounds_are_apart():
    sampling = SamplingConfig(prompts_per_step=4, max_rounds=3)
    requests = [Request.of_batch("a", 0, step, sampling, round=j) for step in range(1, 5) for j in range(3)]
    tasks = [request.first_index + p for request in requests for p in range(request.prompts)]
    assert tasks == list(range(4 * 3 * 4))
    assert len({request.key for request in requests}) == len(requests)
    assert Request.of_batch("a", 0, 4, SamplingConfig(prompts_per_step=4)).first_index == 12


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(st.lists(st.sampled_from([None, 0.0, 0.1, 1.0]), min_size=2, max_size=2), min_size=9, max_size=9),
    rounds=st.integers(1, 3),
)
def test_a_batch_is_a_function_of_its_rewards(tokenizer, table, rounds):
    """Against a second telling of the rule, on plain lists."""
    if all(reward is None for group in table[:PROMPTS] for reward in group):
        table[0][0] = 1.0
    differs = {p: None not in group and group[0] != group[1] for p, group in enumerate(table)}
    played, kept, round_ = [], [], 0
    while len(kept) < PROMPTS and round_ < rounds:
        asked = [round_ * PROMPTS + i for i in range(PROMPTS - len(kept))]
        played += asked
        kept += [p for p in asked if differs[p]]
        round_ += 1
    expected = kept or [p for p in range(PROMPTS) if table[p] != [None, None]]
    gathered = play(tokenizer, table, max_rounds=rounds)
    assert prompts_of(gathered) == expected
    assert [row["prompt_index"] for row in gathered.rows] == [p for p in played for _ in range(2)]
    rewards = [reward for p in played for reward in table[p] if reward is not None]
    told = gathered.sampled
    assert (told.rounds, told.answers, told.failed) == (round_, len(rewards), 2 * len(played) - len(rewards))
    assert told.reward_mean == pytest.approx(math.fsum(rewards) / len(rewards))
    assert told.left_out_groups + len(expected) == len([p for p in played if table[p] != [None, None]])
    again = play(tokenizer, table, max_rounds=rounds)
    assert again.rows == gathered.rows and again.sampled == told
    assert [r.token_ids.tobytes() for r in again.rollouts] == [r.token_ids.tobytes() for r in gathered.rollouts]
