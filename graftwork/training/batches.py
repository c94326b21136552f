"""A batch from disk, checked against what the trainer knows, as examples to learn from. A bad batch ends its run, never
the trainer: everything that could raise or spread a NaN later is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork.errors import BadBatch, BadRunId, StaleBatch
from graftwork.store.queue import Batch, Rollout, parse_version_name
from graftwork.training.packer import Example

LOGPROB_SLACK = 1e-3  # a log-prob may lie this much above 0 by rounding


@dataclass(frozen=True)
class BatchLimits:
    """What a run's batches may be. known_digests: step -> digests that were ever published for it."""

    vocab_size: int
    max_tokens: int
    temperature: float
    max_staleness_steps: int
    known_digests: Mapping[int, Sequence[str]]


def examples_of(batch: Batch, limits: BatchLimits) -> tuple[list[Example], int]:
    """The rollouts that are fresh enough, and how many were dropped because a token of theirs is not.

    A rollout may cross versions: each token keeps the log-prob of the version that sampled it. Raises BadBatch or
    StaleBatch (no rollout is left), naming run, batch and rollout, and what was expected and found.
    """
    if batch.temperature != limits.temperature:
        raise _bad(batch, f"sampled at temperature {batch.temperature}, the run's is {limits.temperature}")
    steps = _steps_of_versions(batch, limits)
    oldest = batch.step - 1 - limits.max_staleness_steps
    fresh = [all(step >= oldest for step in _steps_of(rollout, steps)) for rollout in batch.rollouts]
    if not any(fresh):
        found = min(step for rollout in batch.rollouts for step in _steps_of(rollout, steps))
        raise StaleBatch(
            f"run {batch.run}: batch {batch.step} was sampled from step {found}; the oldest allowed is {oldest}, and "
            "every rollout has older tokens. The batch is set aside and another is awaited"
        )
    numbers: dict[tuple[int, int], int] = {}
    samples = [numbers.setdefault((r.prompt_index, r.sample_index), len(numbers)) for r in batch.rollouts]
    examples = [
        _example(batch, index, rollout, limits, sample)
        for index, (rollout, sample) in enumerate(zip(batch.rollouts, samples, strict=True))
    ]
    return [example for example, is_fresh in zip(examples, fresh, strict=True) if is_fresh], fresh.count(False)


def _steps_of_versions(batch: Batch, limits: BatchLimits) -> list[int]:
    """The step of each version that the batch lists. Raises BadBatch.

    The digests of versions that are too old are not known any more; their rollouts are dropped, whatever they are.
    """
    steps = []
    for version in batch.versions:
        try:
            run, step, digest8 = parse_version_name(version.name)
        except BadRunId as error:
            raise _bad(batch, str(error)) from None
        if run != batch.run or not version.digest.startswith(digest8):
            raise _bad(batch, f"version {version.name} (digest {version.digest[:8]}) is not one of this run's")
        is_fresh = step >= batch.step - 1 - limits.max_staleness_steps
        if is_fresh and version.digest not in limits.known_digests.get(step, ()):
            raise _bad(batch, f"sampled from {version.name}, a digest that the trainer never published for step {step}")
        steps.append(step)
    return steps


def _steps_of(rollout: Rollout, steps: Sequence[int]) -> set[int]:
    """The steps of the versions that sampled its tokens."""
    return {steps[index] for index in np.unique(rollout.version_index[rollout.loss_mask])}


def _example(batch: Batch, index: int, rollout: Rollout, limits: BatchLimits, sample: int) -> Example:
    length, mask = len(rollout.token_ids), rollout.loss_mask
    if length > limits.max_tokens:
        raise _bad(batch, f"rollout {index} has {length} tokens, at most {limits.max_tokens} fit")
    if (low := int(rollout.token_ids.min())) < 0 or (high := int(rollout.token_ids.max())) >= limits.vocab_size:
        found = low if low < 0 else high
        raise _bad(batch, f"rollout {index} holds token id {found}, the vocabulary has 0 to {limits.vocab_size - 1}")
    if mask[0]:
        raise _bad(batch, f"rollout {index} has loss on its first token, which nothing predicts")
    logprobs = rollout.logprobs[mask]
    if not np.isfinite(logprobs).all() or (logprobs > LOGPROB_SLACK).any():
        raise _bad(batch, f"rollout {index} has a log-prob that is not finite or above 0")
    if not np.isfinite([rollout.advantage, rollout.reward]).all():
        raise _bad(
            batch, f"rollout {index}: advantage {rollout.advantage}, reward {rollout.reward}; both must be finite"
        )
    return Example(rollout.token_ids, mask, rollout.logprobs, rollout.advantage, sample)


def _bad(batch: Batch, what: str) -> BadBatch:
    return BadBatch(
        f"run {batch.run}: batch {batch.step}: {what}. The run ends here, this batch is set aside; a resume goes on "
        "from the newest checkpoint and has it sampled anew"
    )
