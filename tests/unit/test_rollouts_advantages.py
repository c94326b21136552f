"""Group-centred advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.errors import BadBatch
from graftwork.rollouts.advantages import group_advantages

REWARD = st.floats(0, 1, width=32)


def test_by_hand():
    advantages = group_advantages([1, 0, 0, 1, 0.5, 0.5, 0.5, 0.5], 4)
    assert advantages.dtype == np.float32
    assert advantages.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_groups_sum_to_zero_and_keep_differences(size, groups, data):
    rewards = np.array(data.draw(st.lists(REWARD, min_size=size * groups, max_size=size * groups)), np.float32)
    advantages = group_advantages(rewards, size).reshape(groups, size)
    assert np.abs(advantages.astype(np.float64).sum(axis=1)).max() < 1e-6
    for group, centred in zip(rewards.reshape(groups, size), advantages, strict=True):
        assert np.allclose(centred - centred[0], group.astype(np.float64) - group[0], atol=1e-6)


@given(REWARD, st.integers(1, 64))
def test_equal_rewards_teach_nothing(reward, size):
    assert not group_advantages([reward] * size, size).any()


def test_no_rewards_no_advantages():
    assert group_advantages([], 8).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "size"), [([1, 2, 3], 2), ([1, 2], 0), ([[1, 2]], 2), ([1, float("nan")], 2), ([1e39, 0], 2)]
)
def test_refused_with_the_runs_name(rewards, size):
    with np.errstate(over="ignore"), pytest.raises(BadBatch, match="run tiny"):
        group_advantages(rewards, size, run="tiny")
