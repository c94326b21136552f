"""Groups that teach nothing are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import random_batch

from graftwork.store.layout import RunId
from graftwork.store.queue import Published, Rollout, Version
from graftwork.training.metrics import equal_groups


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 1, 1, 1, 0, 0, 0, 0], 2), ([1, 0, 1, 1, 0.5, 0.5, 0.5, 0.5], 1), ([0, 1, 2, 3, 4, 5, 6, 7], 0)],
)
def test_groups_whose_answers_earned_the_same(tmp_path: Path, rewards: list[float], expected: int) -> None:
    version = Published(Version(RunId("a"), 0, "ab" * 32), tmp_path, {})
    rollouts: list[Rollout] = [
        replace(rollout, reward=reward)
        for rollout, reward in zip(random_batch(RunId("a"), 1, version).rollouts, rewards, strict=True)
    ]
    assert equal_groups(rollouts) == expected
    assert equal_groups(rollouts[:5]) == equal_groups(rollouts[:4]) + 1, "one answer alone has nothing to differ from"
