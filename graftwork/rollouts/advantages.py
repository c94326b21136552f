"""From rewards to advantages."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graftwork.errors import BadBatch


def group_advantages(rewards_PG: ArrayLike, group_size: int, *, run: object = "?") -> NDArray[np.float32]:
    """Centre each reward on the mean of its own group.

    rewards_PG  [P*G] float32, finite; G = group_size consecutive entries answer one prompt.
    run         whose batch it is: only for the message of an error.
    Returns     [P*G] float32; each group sums to 0 within 1e-6 times its largest reward (or 1). A group whose rewards
                are equal gets exact zeros.
    Raises      BadBatch, naming the run, if P*G is not a multiple of G or a reward is not finite.
    Source      GRPO (arXiv 2402.03300, eq. 3) without the division by the standard deviation (arXiv 2503.20783).
    """
    rewards = np.asarray(rewards_PG, np.float32)
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise BadBatch(
            f"run {run}: rewards of shape {list(rewards.shape)} do not divide into groups of {group_size};"
            " the batch is not made"
        )
    if not np.isfinite(rewards).all():
        where = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise BadBatch(f"run {run}: reward {where} is {rewards[where]}, not a finite number; the batch is not made")
    grouped_P_G = rewards.reshape(-1, group_size).astype(np.float64)
    # The mean of equal numbers need not round back to that number, and their advantage must be 0: centre on the first.
    shifted_P_G = grouped_P_G - grouped_P_G[:, :1]
    centred_P_G = shifted_P_G - shifted_P_G.mean(axis=1, keepdims=True)
    return centred_P_G.astype(np.float32).reshape(-1)


def equal_groups(rewards: Iterable[tuple[int, float]]) -> set[int]:
    """Prompts whose answers all earned the same, so that none of them teaches anything: too easy, or too hard.

    rewards: (prompt_index, reward) of the answers that did not fail. Compared as float32, as advantages are made. One
    answer alone has nothing to differ from.
    """
    different: dict[int, set[np.float32]] = {}
    for prompt_index, reward in rewards:
        different.setdefault(prompt_index, set()).add(np.float32(reward))
    return {prompt_index for prompt_index, values in different.items() if len(values) == 1}
