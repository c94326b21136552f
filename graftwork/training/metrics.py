"""A run's line in metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftwork.rollouts.advantages import equal_groups
from graftwork.store.queue import Batch, Sampled, Version
from graftwork.training.learner import Sums
from graftwork.training.optim import StepOutcome


@dataclass
class Work:
    """A batch that is being learnt.

    stale_rollouts   those that were dropped, with a token from too old a version
    alone            no micro-batch is shared with other runs
    compute_seconds  spent on its micro-batches so far
    """

    batch: Batch
    digest: str
    started: float
    stale_rollouts: int = 0
    alone: bool = False
    compute_seconds: float = 0.0


def metrics_row(
    work: Work, outcome: StepOutcome, sums: Sums, version: Version, batch_wait_seconds: float, step_seconds: float,
    now: float,
) -> dict[str, Any]:  # fmt: skip
    """reward, equal_groups, answer_tokens_mean: of all that was sampled, what the batch left out included.
    batch_wait_seconds: from the end of the last step until the batch was there. step_seconds: between the steps."""
    sampled = work.batch.sampled or sampled_of(work.batch)
    means = sums.means()
    return {
        "step": version.step,
        "reward": sampled.reward_mean,
        "reward_std": sampled.reward_std,
        "loss": sums.loss,
        "kl": means.get("kl"),
        "entropy": means["entropy"],
        "grad_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate,
        "mismatch_mean": means["mismatch"],
        "mismatch_max": sums.mismatch_max,
        "truncated": means["truncated"],
        "equal_groups": sampled.equal_groups,
        "left_out_groups": sampled.left_out_groups,
        "rounds": sampled.rounds,
        "answers": sampled.answers,
        "failed": sampled.failed,
        "rollouts": len(work.batch.rollouts) - work.stale_rollouts,
        "stale_rollouts": work.stale_rollouts,
        "tokens": sums.tokens,
        "loss_tokens": sums.loss_tokens,
        "answer_tokens_mean": sampled.answer_tokens / sampled.answers,
        "skipped": outcome.skipped,
        "version": version.name,
        "batch": work.digest,
        "train_seconds": work.compute_seconds,
        "turn_wait_seconds": now - work.started - work.compute_seconds,
        "wait_seconds": batch_wait_seconds,
        "tokens_per_second": sums.tokens / max(step_seconds, 1e-9),
    }


def sampled_of(batch: Batch) -> Sampled:
    """Where the batch does not say what was sampled for it: what is in it. A conversation that branches is several
    sequences, but was rewarded once."""
    by_sample = {(rollout.prompt_index, rollout.sample_index): rollout.reward for rollout in batch.rollouts}
    rewards = list(by_sample.values())
    mean = sum(rewards) / len(rewards)
    return Sampled(
        rounds=1,
        answers=len(rewards),
        failed=0,
        equal_groups=len(equal_groups((prompt, reward) for (prompt, _), reward in by_sample.items())),
        left_out_groups=0,
        answer_tokens=sum(int(rollout.loss_mask.sum()) for rollout in batch.rollouts),
        reward_mean=mean,
        reward_std=(sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
    )
