"""A batch in rounds: groups that teach nothing are left out, and others may be sampled in their place.

A group (the answers to one prompt) whose rewards are all equal has zero advantages. With `skip_equal_groups` it is not
in the batch. While groups are missing and `max_rounds` allows, another round plays as many other tasks as are missing.
A round's tasks and seeds are a function of (run seed, step, round), and how many it plays follows from the rewards
before it: a batch that is made again from the same version is the same.

Prompt p of round j is prompt j * prompts_per_step + p of the batch, so a prompt_index occurs once, and a batch holds at
most prompts_per_step groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graftwork.config.run import SamplingConfig
from graftwork.rollouts.advantages import equal_groups
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Collected, PlaysBatches, Request, Source, collect
from graftwork.rollouts.environment import Environment
from graftwork.rollouts.sampling import Sampler
from graftwork.store.queue import DigestSource, Rollout, Sampled


@dataclass(frozen=True)
class Gathered:
    """What a batch is made of. rows: of all that was sampled, with `left_out` where the batch does not have it."""

    rollouts: tuple[Rollout, ...]
    rows: list[dict[str, Any]]
    digest_source: DigestSource
    sampled: Sampled

    @property
    def nothing_to_learn(self) -> bool:
        """Whether all groups of the batch are equal ones."""
        return not any(rollout.advantage for rollout in self.rollouts)


async def gather(
    environment: Environment | PlaysBatches, tokenizer: ChatTokenizer, sampler: Sampler, source: Source, run: str,
    seed: int, step: int, sampling: SamplingConfig, timeout_seconds: float | None = None,
) -> Gathered:  # fmt: skip
    """The training batch of `step`. Raises as `collect`."""
    rounds: list[Collected] = []
    missing = sampling.prompts_per_step
    while missing and len(rounds) < sampling.max_rounds:
        request = Request.of_batch(
            run, seed, step, sampling, round=len(rounds), prompts=missing, timeout_seconds=timeout_seconds
        )
        played = await collect(environment, tokenizer, sampler, source, request)
        rounds.append(_numbered(played, len(rounds) * sampling.prompts_per_step))
        missing -= len(_prompts(played.rollouts) - _equal(played.rows))
    return choose(rounds, sampling)


def choose(rounds: Sequence[Collected], sampling: SamplingConfig) -> Gathered:
    """The batch of these rounds. Where every group is equal, it has those of the first round: no batch is empty."""
    rows = [row for played in rounds for row in played.rows]
    rollouts = [rollout for played in rounds for rollout in played.rollouts]
    equal = _equal(rows)
    left_out = equal if sampling.skip_equal_groups else set[int]()
    if left_out == _prompts(rollouts):
        left_out = {prompt for prompt in equal if prompt >= sampling.prompts_per_step}
    rewards = [float(np.float32(row["reward"])) for row in rows if row["reward"] is not None]
    mean = math.fsum(rewards) / len(rewards)
    return Gathered(
        rollouts=tuple(rollout for rollout in rollouts if rollout.prompt_index not in left_out),
        rows=[row | ({"left_out": True} if row["prompt_index"] in left_out else {}) for row in rows],
        digest_source="engine" if all(played.digest_source == "engine" for played in rounds) else "claimed",
        sampled=Sampled(
            rounds=len(rounds),
            answers=len(rewards),
            failed=len(rows) - len(rewards),
            equal_groups=len(equal),
            left_out_groups=len(left_out),
            answer_tokens=sum(int(rollout.loss_mask.sum()) for rollout in rollouts),
            reward_mean=mean,
            reward_std=math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        ),
    )


def _numbered(played: Collected, first: int) -> Collected:
    """The round with its prompts counted from `first`."""
    return replace(
        played,
        rollouts=tuple(replace(rollout, prompt_index=first + rollout.prompt_index) for rollout in played.rollouts),
        rows=[row | {"prompt_index": first + row["prompt_index"]} for row in played.rows],
    )


def _equal(rows: Sequence[dict[str, Any]]) -> set[int]:
    return equal_groups((row["prompt_index"], row["reward"]) for row in rows if row["reward"] is not None)


def _prompts(rollouts: Sequence[Rollout]) -> set[int]:
    return {rollout.prompt_index for rollout in rollouts}
