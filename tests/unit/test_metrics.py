"""Groups that teach nothing are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import random_batch

from graftwork.rollouts.advantages import equal_groups
from graftwork.store.layout import RunId
from graftwork.store.queue import Published, Rollout, Version
from graftwork.training.metrics import sampled_of


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 1, 1, 1, 0, 0, 0, 0], 2), ([1, 0, 1, 1, 0.5, 0.5, 0.5, 0.5], 1), ([0, 1, 2, 3, 4, 5, 6, 7], 0)],
)
def test_groups_whose_answers_earned_the_same(tmp_path: Path, rewards: list[float], expected: int) -> None:
    version = Published(Version(RunId("a"), 0, "ab" * 32), tmp_path, {})
    batch = random_batch(RunId("a"), 1, version)
    rollouts: list[Rollout] = [
        replace(rollout, reward=reward) for rollout, reward in zip(batch.rollouts, rewards, strict=True)
    ]
    told = sampled_of(replace(batch, rollouts=tuple(rollouts)))
    assert (told.equal_groups, told.left_out_groups, told.answers, told.rounds) == (expected, 0, 8, 1)
    assert told.reward_mean == pytest.approx(np.mean(rewards)) and told.reward_std == pytest.approx(np.std(rewards))
    assert told.answer_tokens == sum(int(rollout.loss_mask.sum()) for rollout in rollouts)


def test_equal_is_what_has_no_advantage() -> None:
    assert equal_groups([]) == set()
    assert equal_groups([(4, 0.5), (7, 1.0), (7, 0.0), (4, 0.5)]) == {4}
    assert equal_groups([(0, 0.1)]) == {0}, "one answer alone has nothing to differ from"
    assert equal_groups([(0, 0.1), (0, float(np.float32(0.1)))]) == {0}, "advantages are made from float32"


def test_a_sample_of_several_sequences_was_rewarded_once(tmp_path: Path) -> None:
    version = Published(Version(RunId("a"), 0, "ab" * 32), tmp_path, {})
    batch = random_batch(RunId("a"), 1, version)
    first, second, *_ = batch.rollouts
    branches = (replace(first, reward=1.0), replace(first, reward=1.0), replace(second, reward=0.0))
    told = sampled_of(replace(batch, rollouts=branches))
    assert (told.answers, told.reward_mean, told.equal_groups) == (2, 0.5, 0)
