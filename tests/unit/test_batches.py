"""Which rollouts of a batch are learnt from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import VOCAB, random_batch

from graftwork.errors import BadBatch, StaleBatch
from graftwork.store.layout import RunId
from graftwork.store.queue import Batch, Published, SampledVersion, Version
from graftwork.training.batches import BatchLimits, examples_of

RUN, STEP = RunId("a"), 9
VERSIONS = [Version(RUN, step, f"{step}" * 64) for step in (8, 6, 5)]
"""With a limit of 2 steps, batch 9 may hold tokens of 6, 7 and 8."""


def batch_of(indices: list[list[int]]) -> Batch:
    """Rollout i's first sampled tokens come from these versions, the others from the last of them."""
    batch = random_batch(RUN, STEP, Published(VERSIONS[0], Path(), {}), rollouts=len(indices))
    versions = tuple(SampledVersion(version.name, version.digest, "engine") for version in VERSIONS)
    rollouts = []
    for rollout, sampled_by in zip(batch.rollouts, indices, strict=True):
        index = np.full_like(rollout.version_index, -1)
        places = np.flatnonzero(rollout.loss_mask)
        index[places] = sampled_by[-1]
        index[places[: len(sampled_by)]] = sampled_by
        rollouts.append(replace(rollout, version_index=index))
    return replace(batch, versions=versions, rollouts=tuple(rollouts))


def limits(**changes: object) -> BatchLimits:
    known = {version.step: (version.digest,) for version in VERSIONS[:2]}  # digests of older steps are forgotten
    return replace(BatchLimits(VOCAB, 64, 1.0, 2, known), **changes)  # type: ignore[arg-type]


def test_a_rollout_may_cross_versions_within_the_limit_and_no_other() -> None:
    batch = batch_of([[0], [0, 1], [1], [0, 2], [2], [1, 0]])
    examples, stale = examples_of(batch, limits())
    assert stale == 2
    for example, index in zip(examples, (0, 1, 2, 5), strict=True):
        rollout = batch.rollouts[index]
        assert example.token_ids is rollout.token_ids and example.advantage == rollout.advantage
        assert np.array_equal(example.sampler_logprobs, rollout.logprobs), "each token's own, from whichever version"


def test_a_version_that_sampled_nothing_makes_nothing_stale() -> None:
    examples, stale = examples_of(batch_of([[0]] * 4), limits())
    assert (len(examples), stale) == (4, 0)


def test_a_batch_of_nothing_else_is_stale() -> None:
    with pytest.raises(StaleBatch, match=r"batch 9 was sampled from step 5; the oldest allowed is 6"):
        examples_of(batch_of([[0, 2], [2]]), limits())


def test_a_digest_that_was_never_published_is_a_bad_batch_even_where_rollouts_are_dropped() -> None:
    known = {8: ("ab" * 32,), 6: (VERSIONS[1].digest,)}
    with pytest.raises(BadBatch, match="a digest that the trainer never published for step 8"):
        examples_of(batch_of([[2], [1]]), limits(known_digests=known))
    with pytest.raises(BadBatch, match="never published for step 9"):
        future = SampledVersion(f"a@9-{'ab' * 4}", "ab" * 32, "engine")
        examples_of(replace(batch_of([[1]]), versions=(future, *batch_of([[1]]).versions[1:])), limits())


def test_a_dropped_rollout_is_checked_as_well() -> None:
    """Its reward goes into the metrics."""
    batch = batch_of([[0], [2]])
    broken = replace(batch.rollouts[1], reward=float("nan"))
    with pytest.raises(BadBatch, match="rollout 1: advantage"):
        examples_of(replace(batch, rollouts=(batch.rollouts[0], broken)), limits())
